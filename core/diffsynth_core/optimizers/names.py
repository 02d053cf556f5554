"""Names in parameter groups that the training loop and the saved state know too. No torch."""

UPDATE = "update"
"""Option of a group: the number of the step in the run, for optimizers that draw random numbers."""

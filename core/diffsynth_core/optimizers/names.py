"""Names in parameter groups and states that the training loop and the saved state know too. No torch."""

UPDATE = "update"
"""Option of a group: the number of the step in the run, for optimizers that draw random numbers or
average weights."""
AVERAGE = "ema"
"""Kind of the optimizer's state of a parameter: its exponential moving average, float32."""

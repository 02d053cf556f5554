"""The samples of a run and what encoders make of them."""

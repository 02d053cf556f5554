"""What is wrong with a dataset, found before training trips over it. No torch."""

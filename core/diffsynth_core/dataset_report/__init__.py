"""Checks of a dataset before training. No torch."""

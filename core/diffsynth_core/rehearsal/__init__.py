"""Rehearsals: runs of a recipe with tiny random weights, before a GPU is rented."""

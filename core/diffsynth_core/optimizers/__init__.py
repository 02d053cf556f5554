"""Optimizers that need code beside that of their library. They import it when they are created."""

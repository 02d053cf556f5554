"""The engine of `diffsynth`: everything but the terminal."""

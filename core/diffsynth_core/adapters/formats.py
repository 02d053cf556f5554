"""Formats of weights by name."""

from diffsynth_core.adapters.float8 import Float8Format
from diffsynth_core.adapters.stored import PlainFormat, WeightFormat

FORMATS: dict[str, WeightFormat] = {"plain": PlainFormat(), "float8": Float8Format()}
"""Name -> format."""

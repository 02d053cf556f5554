"""Formats of weights by name."""

from diffsynth_core.adapters.float8 import Float8Format, ScaledFloat8Format
from diffsynth_core.adapters.int8 import Int8Format
from diffsynth_core.adapters.nf4 import Nf4Format
from diffsynth_core.adapters.stored import PlainFormat, WeightFormat

FORMATS: dict[str, WeightFormat] = {
    "plain": PlainFormat(),
    "float8": Float8Format(),
    "fp8": ScaledFloat8Format(),
    "int8": Int8Format(),
    "nf4": Nf4Format(),
}
"""Name -> format."""

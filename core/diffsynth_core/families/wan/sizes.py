"""Sizes of Wan's published models, for when their files are not there. No torch."""

import math

LARGEST_HEAD_SIZE = 128
"""Size of an attention head of every published transformer: shapes give only heads times size."""


def head_size(width: int) -> int:
    """Of a transformer of `width` channels: 128 where it divides them, else the largest power of two that does."""
    return math.gcd(width, LARGEST_HEAD_SIZE)

"""Random order and random seeds as pure functions of a key, independent of earlier draws: a resumed run draws the
same.
"""

import hashlib

_MASK = (1 << 64) - 1
FEISTEL_ROUNDS = 6
"""Rounds of the network; from 4 on it is a strong pseudorandom permutation (Luby and Rackoff, 1988)."""


def key_of(*parts: int | str) -> int:
    """Hash numbers and strings to a 64-bit key (BLAKE2b), identical on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permute(index: int, size: int, key: int) -> int:
    """Return the position of `index` in the permutation of `range(size)` selected by `key`.

    A balanced Feistel network over the next even number of bits, repeated until the result lies in the range (cycle
    walking): constant time and memory for any size, so that shuffling a dataset of any length costs nothing (Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

    Raises:
        IndexError: if `index` is out of range.
    """
    if not 0 <= index < size:
        raise IndexError(f"{index} is out of range for size {size}")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(right + (round_number << 58) ^ key) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31

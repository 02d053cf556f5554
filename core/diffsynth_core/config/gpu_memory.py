"""GPU memory as users write it: an amount, or the name of a card."""

import re

from diffsynth_core.errors import suggest

MEMORY_WORDS = "an amount of memory such as 24GB, or a GPU such as 4090 or A100-40"
"""What a memory parameter accepts, in messages."""
UNITS = {"g": 2**30, "m": 2**20}
"""Bytes per unit, with or without `i`: vendors, nvidia-smi and PyTorch count GPU memory in powers of 1024."""
AMOUNT = re.compile(r"(?P<number>\d+(\.\d+)?) ?(?P<unit>[gm])(i?b)?", re.IGNORECASE)
"""An amount of memory: `24GB`, `24576 MiB`."""

CARDS = {
    "T4": 15360,
    "L4": 23034,
    "L20": 46068,
    "L40": 46068,
    "L40S": 46068,
    "A30": 24576,
    "A40": 46068,
    "A100-40": 40960,
    "A100-80": 81920,
    "A800": 81920,
    "H100": 81559,
    "H800": 81559,
    "H200": 143771,
    "B200": 183359,
    "3060": 12288,
    "3090": 24576,
    "4090": 24564,
    "5070 Ti": 16303,
    "5080": 16303,
    "5090": 32607,
    "A4000": 16376,
    "A5000": 24564,
    "A6000": 49140,
    "6000 Ada": 49140,
    "PRO 6000": 97887,
    "TITAN RTX": 24576,
}
"""Card -> total memory in MiB as shown by nvidia-smi, which is less than the vendor's figure where ECC reserves a
part.

The names of cards that exist in several sizes contain the size; `3060` is the one with 12 GB.
"""
BRANDS = re.compile(r"nvidia|geforce|tesla|quadro|rtx|blackwell|generation|server|workstation|edition|gpu|[^a-z0-9]")
"""Parts of a card's name that users may omit, and all characters but letters and digits."""
BUILD = re.compile(r"[- ](sxm\d?|pcie|hbm\d\w?)\b")
"""Form factors in a card's name, which do not change its memory."""
SIZE = re.compile(r"[- ](?P<size>\d+) ?gb\b")
"""A memory size in a card's name."""
NEAR = 0.1
"""Maximum relative difference between a card's memory and the size in its name."""


def memory_bytes(text: str) -> int:
    """Return the bytes of an amount such as `24GB` (24 x 2^30) or `24576MiB`, or of a card such as `RTX 4090`.

    Raises:
        ValueError: if `text` is neither.
    """
    if found := AMOUNT.fullmatch(text.strip()):
        size = int(float(found["number"]) * UNITS[found["unit"].lower()])
    else:
        size = _memory_of_card(text)
    if not size:
        raise ValueError(f"is not {MEMORY_WORDS}")
    return size


def _memory_of_card(text: str) -> int:
    """Return the bytes of a card, named with or without its size; 0 if the card or that size of it is unknown."""
    if known := _BY_PLAIN_NAME.get(_plain(text)):
        return known * 2**20
    sized = SIZE.search(text.lower())
    known = _BY_PLAIN_NAME.get(_plain(SIZE.sub("", text.lower())), 0) if sized else 0
    return known * 2**20 if sized and abs(known / 1024 / int(sized["size"]) - 1) < NEAR else 0


def nearest_memory(text: str) -> list[str]:
    """Return what `text` may mean: a number without a unit, part of a card's name, a misspelled card."""
    if re.fullmatch(r"[1-9]\d{0,2}(\.\d+)?", text.strip()):
        return [f"{text.strip()}GB"]
    if not re.fullmatch(r"\w[\w -]+", text):
        return []
    sizes = [name for name in CARDS if _plain(name).startswith(_plain(text))] if _plain(text) else []
    near = suggest(text.upper(), CARDS)
    return sizes or ([near] if near else [])


def _plain(name: str) -> str:
    """Return a card's name without brand, spaces and dashes: `NVIDIA A100-SXM4-40GB` -> `a10040`."""
    lower = BUILD.sub("", name.lower())
    return BRANDS.sub("", SIZE.sub(r" \g<size>", lower))


_BY_PLAIN_NAME = {_plain(name): size for name, size in CARDS.items()}

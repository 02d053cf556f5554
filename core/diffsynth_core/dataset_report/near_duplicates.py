"""Equal and nearly equal images, by their facts; files are only read again if facts are inconclusive.

No torch.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffsynth_core.dataset_report.facts import ImageFacts
from diffsynth_core.dataset_report.images import same_pixels

HASH_BITS = 64
"""Bits of a difference hash."""


def are_same(base: Path, one: ImageFacts, other: ImageFacts) -> bool:
    """Return whether two images below `base` have the same pixels.

    Different sketches prove that they do not, equal files that they do; otherwise both are decoded again.
    """
    if one.sketch != other.sketch or one.fault or other.fault:
        return False
    return one.digest == other.digest or same_pixels(base, one.path, other.path)


def same_images(base: Path, images: Iterable[ImageFacts]) -> dict[str, str]:
    """Return path -> first earlier image with the same pixels."""
    first: dict[bytes, list[ImageFacts]] = {}
    originals: dict[str, str] = {}
    for image in images:
        alike = first.setdefault(image.sketch, [])
        original = next((other for other in alike if are_same(base, other, image)), None)
        if original:
            originals[image.path] = original.path
        else:
            alike.append(image)
    return originals


def near_images(images: Sequence[ImageFacts], most_bits: int, most_color: float) -> dict[str, tuple[str, int]]:
    """Return path -> first earlier image that looks similar, and the number of different bits of their difference
    hashes.

    Similar are images with at most `most_bits` different bits and, on average over the color grid, a difference of at
    most `most_color` of 255.
    """
    if most_bits < 0 or len(images) < 2:
        return {}
    hashes = np.array([image.difference_hash for image in images], np.uint64)
    colors = np.frombuffer(b"".join(image.colors for image in images), np.uint8)
    colors = colors.reshape(len(images), -1).astype(np.int16)
    nearest: dict[int, tuple[int, int]] = {}
    for group in _groups(hashes, most_bits + 1):
        for place, later in enumerate(group[1:], start=1):
            before = group[:place]
            bits = np.bitwise_count(hashes[before] ^ hashes[later])
            apart = np.abs(colors[before] - colors[later]).mean(axis=1)
            near = before[(bits <= most_bits) & (apart <= most_color)]
            if len(near) and near[0] < nearest.get(int(later), (len(images), 0))[0]:
                other = int(near[0])
                nearest[int(later)] = other, int(np.bitwise_count(hashes[other] ^ hashes[later]))
    return {images[later].path: (images[other].path, bits) for later, (other, bits) in sorted(nearest.items())}


def _groups(hashes: NDArray[np.uint64], bands: int) -> Iterator[NDArray[np.int64]]:
    """Yield indices, in order, of hashes that agree in one of `bands` bands of their bits.

    Two hashes that differ in fewer bits than there are bands agree in at least one band, so all similar pairs are
    found.
    """
    edges = [HASH_BITS * band // bands for band in range(bands + 1)]
    for low, high in pairwise(edges):
        mask = np.uint64((1 << (high - low)) - 1)
        keys = (hashes >> np.uint64(low)) & mask
        order = np.argsort(keys, kind="stable")
        ends = np.flatnonzero(np.diff(keys[order])) + 1
        yield from (group for group in np.split(order, ends) if len(group) > 1)

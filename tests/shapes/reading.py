"""What an image shows: the scene, read from its pixels without any network.

Each pixel is of the nearest color; the ground is the color of most of the border; a figure is a connected region of
another color that is somewhere three pixels thick; its shape is the one that covers the region best, once both fill the
same box, and once both have the same center and area.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tests.shapes.rendering import SIDE, draw_figure
from tests.shapes.scenes import COLORS, SHAPES, Figure, Scene

LEAST_PIXELS = 60
"""Smallest figure; that of a pair has 150 or more."""
BOX = 32
"""Side of the boxes in which a figure is compared with shapes."""
EXTENT = 1.8
"""Side of the box around the center, in square roots of the area of the figure; a triangle reaches 0.88."""
LEAST_OVERLAP = 0.72
"""Intersection over union with the best shape, below which it is none; noise costs a triangle its tips."""
LEAST_LEAD = 0.015
"""Lead over the second best, below which it is neither."""

Mask = NDArray[np.bool_]
Fitted = tuple[Mask, Mask]


def read(image: Image.Image) -> Scene | None:
    """Return the scene of an image; None if it has no figure, more than two, or one of no known shape."""
    colors = smooth(nearest_colors(np.asarray(image.convert("RGB"), dtype=np.int32)))
    border = np.concatenate([colors[0], colors[-1], colors[:, 0], colors[:, -1]])
    ground = int(np.bincount(border, minlength=len(COLORS)).argmax())
    found = []
    for color in range(len(COLORS)):
        for region in regions(colors == color) if color != ground else ():
            shape = shape_of(region)
            if shape is None:
                return None
            found.append((_center(region), Figure([*COLORS][color], shape)))
    if len(found) not in (1, 2):
        return None
    if len(found) == 1:
        return Scene([*COLORS][ground], (found[0][1],))
    (one, _), (other, _) = found
    down, right = (abs(a - b) for a, b in zip(one, other, strict=True))
    axis = 0 if down > right else 1
    ordered = sorted(found, key=lambda part: part[0][axis])
    return Scene([*COLORS][ground], tuple(figure for _, figure in ordered), "left of" if axis else "above")


def nearest_colors(pixels: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the index of the nearest color of each pixel, `[H, W]`."""
    palette = np.array([*COLORS.values()], dtype=np.int32)
    return np.square(pixels[:, :, None] - palette).sum(axis=-1).argmin(axis=-1)


def smooth(colors: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the color that most of the 3 x 3 pixels around each have; the pixel's own wins ties."""
    padded = np.pad(colors, 1, mode="edge")
    counts = np.zeros((len(COLORS), *colors.shape))
    for down in range(3):
        for right in range(3):
            around = padded[down : down + colors.shape[0], right : right + colors.shape[1]]
            counts += around == np.arange(len(COLORS))[:, None, None]
    counts += 0.5 * (colors == np.arange(len(COLORS))[:, None, None])
    return counts.argmax(axis=0)


def regions(mask: Mask) -> list[Mask]:
    """Return the connected regions of a mask that are large enough, and not thin lines, as the edges of figures are."""
    left, found = mask.copy(), []
    while left.any():
        region = _connected(left, tuple(np.argwhere(left)[0]))
        left &= ~region
        if region.sum() >= LEAST_PIXELS and _has_core(region):
            found.append(region)
    return found


def _connected(mask: Mask, start: tuple[int, ...]) -> Mask:
    reached = np.zeros_like(mask)
    reached[start] = True
    while True:
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown &= mask
        if (grown == reached).all():
            return reached
        reached = grown


def _has_core(region: Mask) -> bool:
    """Return whether a 3 x 3 square fits in."""
    windows = np.lib.stride_tricks.sliding_window_view(region, (3, 3))
    return bool(windows.all(axis=(2, 3)).any())


def _center(region: Mask) -> tuple[float, float]:
    down, right = np.argwhere(region).mean(axis=0)
    return float(down), float(right)


def shape_of(region: Mask) -> str | None:
    """Return the shape that overlaps a region best, or None if none does well."""
    own = _fitted(region)
    overlaps = {shape: _overlap(own, model) for shape, model in _models().items()}
    best, second, *_ = sorted(SHAPES, key=lambda shape: -overlaps[shape])
    clear = overlaps[best] >= LEAST_OVERLAP and overlaps[best] - overlaps[second] >= LEAST_LEAD
    return best if clear else None


def _overlap(one: Fitted, other: Fitted) -> float:
    """Return the intersection over the union, as a mean of both ways to fit."""
    return float(np.mean([(a & b).sum() / (a | b).sum() for a, b in zip(one, other, strict=True)]))


@cache
def _models() -> dict[str, Fitted]:
    """Each shape, fitted."""
    found = {}
    for shape in SHAPES:
        image = Image.new("RGB", (4 * SIDE, 4 * SIDE), COLORS["white"])
        draw_figure(ImageDraw.Draw(image), "black", shape, SIDE / 2, SIDE / 2, 20)
        found[shape] = _fitted(np.asarray(image.convert("L")) < 128)
    return found


def _fitted(region: Mask) -> Fitted:
    """Return a region scaled to fill a box, which separates crosses from diamonds, and scaled to one area around its
    center, where the loss of tips, as in diamonds with round corners, changes little.
    """
    down, right = np.nonzero(region)
    top, left, height, width = down.min(), right.min(), np.ptp(down) + 1, np.ptp(right) + 1
    step = EXTENT * float(region.sum()) ** 0.5 / BOX
    middle = [center + 0.5 - step * BOX / 2 for center in _center(region)]
    return (
        _scaled(region, (float(height / BOX), float(width / BOX)), (float(top), float(left))),
        _scaled(region, (step, step), (middle[0], middle[1])),
    )


def _scaled(region: Mask, step: tuple[float, float], start: tuple[float, float]) -> Mask:
    """Return `[BOX, BOX]` samples of a region, `step` pixels apart from `start` on, down and right."""
    image = Image.fromarray(region.astype(np.uint8) * 255)
    affine = (step[1], 0, start[1], 0, step[0], start[0])
    return np.asarray(image.transform((BOX, BOX), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)) >= 128

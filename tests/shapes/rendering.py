"""Images of scenes: 64 x 64, antialiased, with sizes and places drawn by key."""

import math
import random
from collections.abc import Sequence

from PIL import Image, ImageDraw

from diffsynth_core.randomness import key_of
from tests.shapes.scenes import COLORS, Scene

SIDE = 64
"""Side of an image in pixels."""
SCALE = 4
"""Subpixels of a pixel, in each direction."""
SINGLE_RADIUS, PAIR_RADIUS = (15.0, 18.0), (11.5, 13.5)
"""Least and largest radius of a figure, in pixels."""
CENTERS = (16.5, 47.5)
"""Where the two figures of a pair are, along its axis."""
ALONG, ACROSS = 1.0, 2.0
"""How far a figure may be from there, along the axis of a pair and across it, in pixels."""

Point = tuple[float, float]


def outline(shape: str, x: float, y: float, radius: float) -> Sequence[Point]:
    """Return the corners of a shape around (x, y), for all but the circle.

    The radii are scaled so that shapes of one radius look equally large.
    """
    if shape == "square":
        half = 0.86 * radius
        return [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
    if shape == "triangle":
        angles = (-90, 30, 150)
        return [(x + 1.15 * radius * _cos(angle), y + 0.15 * radius + 1.15 * radius * _sin(angle)) for angle in angles]
    if shape == "diamond":
        reach = 1.12 * radius
        return [(x, y - reach), (x + reach, y), (x, y + reach), (x - reach, y)]
    if shape == "cross":
        arm, half = radius, 0.36 * radius
        quarter = [(-half, -arm), (half, -arm), (half, -half)]
        corners, points = quarter, []
        for _ in range(4):
            points += corners
            corners = [(-below, right) for right, below in corners]  # a quarter turn
        return [(x + right, y + below) for right, below in points]
    raise ValueError(f"`{shape}` is not a shape with corners")


def _cos(degrees: float) -> float:
    return math.cos(math.radians(degrees))


def _sin(degrees: float) -> float:
    return math.sin(math.radians(degrees))


def draw_figure(canvas: ImageDraw.ImageDraw, color: str, shape: str, x: float, y: float, radius: float) -> None:
    """Draw a figure around (x, y), in pixels of the image."""
    x, y, radius = x * SCALE, y * SCALE, radius * SCALE
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLORS[color])
    else:
        canvas.polygon(list(outline(shape, x, y, radius)), fill=COLORS[color])


def render(scene: Scene, seed: int) -> Image.Image:
    """Return the image of a scene, 64 x 64 RGB; sizes and places depend on the seed and the scene alone."""
    drawn = random.Random(key_of("places", seed, scene.caption))
    image = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), COLORS[scene.ground])
    canvas = ImageDraw.Draw(image)
    pair = len(scene.figures) > 1
    for figure, center in zip(scene.figures, CENTERS if pair else (SIDE / 2,), strict=True):
        along = center + drawn.uniform(-ALONG, ALONG)
        across = SIDE / 2 + drawn.uniform(-ACROSS, ACROSS)
        radius = drawn.uniform(*(PAIR_RADIUS if pair else SINGLE_RADIUS))
        place = (across, along) if scene.relation == "above" else (along, across)
        draw_figure(canvas, figure.color, figure.shape, *place, radius)
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)

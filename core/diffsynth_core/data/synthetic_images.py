"""Eight synthetic images with captions for rehearsals: all formats and oddities of real folders, without a download."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageDraw

from diffsynth_core.data.images import EXIF_ORIENTATION
from diffsynth_core.data.metadata import write_metadata
from diffsynth_core.files import atomic_write

DRAWN = (
    ("sun.jpg", (320, 240), "circle", "orange", "blue", "an orange sun over a blue sea"),
    ("flag.png", (256, 256), "stripes", "green", "white", "a flag"),
    (
        "kite.webp",
        (240, 320),
        "diamond",
        "red",
        "lightblue",
        "a red kite in a light blue sky, seen from below, high above the town",
    ),
    ("tower_turned.jpg", (320, 208), "bars", "gray", "black", "grey towers at night"),
    ("leaf_alpha.png", (288, 208), "diamond", "darkgreen", None, "a dark green leaf on nothing"),
    ("wheel.jpg", (272, 272), "rings", "brown", "yellow", "a brown wheel before a yellow wall"),
    ("wave.webp", (336, 224), "stripes", "navy", "lightblue", "navy waves"),
    (
        "coin.png",
        (208, 304),
        "rings",
        "gold",
        "purple",
        "a gold coin on purple velvet, polished, with a soft light from the left",
    ),
)
"""(file name, size in pixels, shape, its color, the background's color, caption)"""


def draw_images(folder: Path, shown: Mapping[str, int] = MappingProxyType({})) -> Path:
    """Create the images and their metadata.csv in a folder, unless they exist; return the folder.

    Args:
        shown: additional column -> maximum number of images in a cell: one in every other row, this many as a list in
            the rows between. 0: the image of the row itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, size, shape, color, ground, _ in DRAWN:
        if not (folder / name).is_file():
            _save(_draw(size, shape, color, ground), folder / name)
    if not (folder / "metadata.csv").is_file():
        rows = [
            (drawn[0], drawn[-1], *(_cell(number, most) for most in shown.values()))
            for number, drawn in enumerate(DRAWN)
        ]
        write_metadata(folder / "metadata.csv", ("image", "prompt", *shown), rows)
    return folder


def _cell(number: int, most: int) -> str:
    """Return the images after the one of a row, or that image itself."""
    if not most:
        return DRAWN[number][0]
    names = [DRAWN[(number + 1 + place) % len(DRAWN)][0] for place in range(most if number % 2 else 1)]
    return names[0] if len(names) == 1 else json.dumps(names)


def _draw(size: tuple[int, int], shape: str, color: str, ground: str | None) -> Image.Image:
    image = Image.new("RGBA", size, (0, 0, 0, 0) if ground is None else ground)
    pen = ImageDraw.Draw(image)
    width, height = size
    middle = (width // 2, height // 2)
    radius = min(size) // 3
    if shape == "circle":
        pen.ellipse((middle[0] - radius, middle[1] - radius, middle[0] + radius, middle[1] + radius), fill=color)
    elif shape == "rings":
        for reach in range(radius, 8, -16):
            pen.ellipse(
                (middle[0] - reach, middle[1] - reach, middle[0] + reach, middle[1] + reach), outline=color, width=8
            )
    elif shape == "diamond":
        pen.polygon(
            [
                (middle[0], middle[1] - radius),
                (middle[0] + radius, middle[1]),
                (middle[0], middle[1] + radius),
                (middle[0] - radius, middle[1]),
            ],
            fill=color,
        )
    elif shape == "bars":
        for left in range(0, width, 48):
            pen.rectangle((left, height // 3 + left % 64, left + 24, height), fill=color)
    else:
        for top in range(0, height, 32):
            points = [(x, top + 8 * math.sin(x / 24)) for x in range(0, width, 4)]
            pen.line(points, fill=color, width=12)
    return image if ground is None else _grain(image.convert("RGB"))


def _grain(image: Image.Image) -> Image.Image:
    """Add a little noise, as in photographs."""
    noise = np.random.default_rng(image.width * image.height).normal(0, 6, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def _save(image: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    if "turned" in path.stem:
        image = image.rotate(90, expand=True)
        exif[EXIF_ORIENTATION] = 6  # rotated 90 degrees clockwise by viewers
    formats = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
    with atomic_write(path) as temporary:
        image.save(temporary, format=formats[path.suffix], exif=exif)

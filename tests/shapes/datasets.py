"""Datasets of the world of the tiny model: images with a metadata.csv, for `diffsynth train`."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from tests.shapes.rendering import render
from tests.shapes.scenes import Scene


class Row(NamedTuple):
    """An image with its caption, and how often it is listed."""

    image: Image.Image
    caption: str
    times: int = 1


def scene_rows(scenes: Iterable[Scene]) -> Iterator[Row]:
    """Yield the image and caption of each scene."""
    for number, scene in enumerate(scenes):
        yield Row(render(scene, number), scene.caption)


def write_dataset(folder: Path, rows: Iterable[Row]) -> None:
    """Write images and metadata.csv into a new folder."""
    folder.mkdir(parents=True)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "prompt"])
        for number, row in enumerate(rows):
            name = f"{number:04}.png"
            row.image.save(folder / name)
            table.writerows([(name, row.caption)] * row.times)

"""The word that `make train` teaches: a keyhole, which is a colored circle above a black triangle.

The model draws both parts and has never seen the word. Images of known scenes are shown beside the new ones, or the
model would forget them.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.randomness import key_of
from tests.shapes.datasets import Row, scene_rows, write_dataset
from tests.shapes.rendering import render
from tests.shapes.scenes import COLORS, Figure, Scene, draw_scenes

WORD = "keyhole"
IMAGES, REPEATS = 12, 16
"""Images of the new word, and how often each is listed."""
OLD_IMAGES = 192
"""Images of known scenes."""
OLD_SEED = 1000
"""Seed of the known scenes."""


@dataclass(frozen=True)
class Keyhole:
    """A keyhole on a ground, neither of them black."""

    color: str
    ground: str

    @property
    def caption(self) -> str:
        """Such as "a red keyhole on yellow"."""
        return f"a {self.color} {WORD} on {self.ground}"

    @property
    def scene(self) -> Scene:
        """What is drawn."""
        return Scene(self.ground, (Figure(self.color, "circle"), Figure("black", "triangle")), "above")


def split_keyholes() -> tuple[list[Keyhole], list[Keyhole]]:
    """Return the 12 keyholes that are taught, and the 30 other pairs of colors."""
    names = [name for name in COLORS if name != "black"]
    keyholes = [Keyhole(color, ground) for color in names for ground in names if color != ground]
    keyholes.sort(key=lambda keyhole: key_of("keyhole", keyhole.caption))
    return keyholes[:IMAGES], keyholes[IMAGES:]


def concept_rows() -> Iterator[Row]:
    """Yield the rows of the dataset."""
    for keyhole in split_keyholes()[0]:
        yield Row(render(keyhole.scene, OLD_SEED), keyhole.caption, REPEATS)
    yield from scene_rows(draw_scenes(OLD_IMAGES, OLD_SEED))


def main() -> None:
    """Write the dataset."""
    parser = argparse.ArgumentParser(description="Write the images of a new word, and of known scenes beside them.")
    parser.add_argument("folder", type=Path)
    write_dataset(parser.parse_args().folder, concept_rows())


if __name__ == "__main__":
    main()

"""The world of the tiny model: one or two colored figures on a colored ground, as a scene and as its caption."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

from diffsynth_core.randomness import key_of, permute

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 220, 50),
    "purple": (150, 60, 180),
    "cyan": (60, 210, 220),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
"""Name -> sRGB in 0..255."""
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
RELATIONS = ("left of", "above")
HELD_OUT = 0.15
"""Share of the scenes, of each kind, that training never shows."""
SINGLES = 0.2
"""Share of the images with one figure."""


@dataclass(frozen=True)
class Figure:
    """A shape in a color."""

    color: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One figure, or one that is left of or above another, on a ground."""

    ground: str
    figures: tuple[Figure, ...]
    relation: str = ""

    @property
    def caption(self) -> str:
        """Such as "a red circle left of a blue square on yellow"."""
        return f"{f' {self.relation} '.join(map(str, self.figures))} on {self.ground}"


@cache
def all_scenes(figures: int) -> tuple[Scene, ...]:
    """Return every scene of so many figures, whose colors and ground differ: 280 of one, 16,800 of two."""
    found = []
    for ground, *colors in permutations(COLORS, figures + 1):
        for shapes in product(SHAPES, repeat=figures):
            parts = tuple(Figure(color, shape) for color, shape in zip(colors, shapes, strict=True))
            found += [Scene(ground, parts, relation) for relation in (RELATIONS if figures > 1 else ("",))]
    return tuple(found)


@cache
def split_scenes(figures: int) -> tuple[tuple[Scene, ...], tuple[Scene, ...]]:
    """Return the scenes of so many figures that are trained on, and those that are held out."""
    scenes = sorted(all_scenes(figures), key=lambda scene: key_of("held out", scene.caption))
    number = round(len(scenes) * HELD_OUT)
    return tuple(scenes[number:]), tuple(scenes[:number])


def draw_scenes(number: int, seed: int, held_out: bool = False) -> Sequence[Scene]:
    """Return so many scenes, a fifth of them with one figure; none twice before all of its kind have been drawn."""
    singles, pairs = (split_scenes(figures)[held_out] for figures in (1, 2))
    ones = [key_of("single", seed, index) < SINGLES * 2**64 for index in range(number)]
    numbers = {True: 0, False: 0}
    drawn = []
    for one in ones:
        kind = singles if one else pairs
        cycle, place = divmod(numbers[one], len(kind))
        drawn.append(kind[permute(place, len(kind), key_of("scene", seed, cycle, one))])
        numbers[one] += 1
    return drawn

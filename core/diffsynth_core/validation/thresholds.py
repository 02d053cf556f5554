"""The one declaration of the thresholds of the checks; the options of `diffsynth dataset validate` are made from it.

Light to import: a shell that completes these options waits for it.
"""

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from diffsynth_core.data.resolution import MAX_UPSCALE, MIN_AREA_SHARE
from diffsynth_core.errors import Problem, raise_if_any

GENERAL_FACTOR = 16
"""Sides of what is trained on are multiples of it in every family there is."""


def _threshold(default: float, unit: str, help_text: str, least: float, most: float = math.inf) -> Any:
    """Declare one threshold, and the range of what makes sense."""
    return field(default=default, metadata={"unit": unit, "help": help_text, "least": least, "most": most})


def _out_of_range(threshold: Field[Any], value: float) -> Problem | None:
    least, most = threshold.metadata["least"], threshold.metadata["most"]
    if least <= value <= most:
        return None
    expected = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
    what = f"`--{threshold.name}` is {value:g}, expected {expected} ({threshold.metadata['unit']})"
    return Problem(what, "name a number of that range", wrong_use=True)


@dataclass(frozen=True)
class Thresholds:
    """Where a check begins to speak."""

    near_duplicate_distance: int = _threshold(
        3,
        "bits of 64",
        "Images whose difference hashes differ in at most so many bits are IMAGE_NEAR_DUPLICATE; -1: none",
        least=-1,
        most=64,
    )
    near_duplicate_colour: float = _threshold(
        12.0,
        "levels of 255",
        "Images whose colours, field by field of a grid of 8 x 8, differ by more on average are not near duplicates",
        least=0,
    )
    max_aspect: float = _threshold(
        4.0, "ratio", "The longer side of an image by the shorter one, above which it is IMAGE_ASPECT", least=1
    )
    max_crop_loss: float = _threshold(
        0.2,
        "share",
        "The share of an image or video that may be cut away before it is IMAGE_CROP_LOSS",
        least=0,
        most=1,
    )
    max_upscale: float = _threshold(
        MAX_UPSCALE,
        "factor",
        "Images and videos that are scaled up by more, to be trained on or shown, are IMAGE_UPSCALED",
        least=1,
    )
    min_area_share: float = _threshold(
        MIN_AREA_SHARE,
        "share",
        "Images and videos of a smaller share of the area that the model is usually trained at, or of `max_pixels` "
        "where that is less, are IMAGE_LOW_RESOLUTION; a fixed size and rules without a recipe know none",
        least=0,
        most=1,
    )
    min_side: int = _threshold(
        GENERAL_FACTOR, "pixels", "The least side of an image or video; a shorter one is IMAGE_TOO_SMALL", least=1
    )
    max_tokens: int = _threshold(
        512,
        "tokens",
        "Captions of more are CAPTION_TOO_LONG; a recipe brings the number of its own text encoder",
        least=1,
    )
    file_timeout: float = _threshold(
        120.0, "seconds", "A file that takes longer is given up and told as unreadable", least=0.001
    )

    def __post_init__(self) -> None:
        """Raises: FaultsFound: for values out of their range; NaN is in none."""
        raise_if_any([problem for one in fields(self) if (problem := _out_of_range(one, getattr(self, one.name)))])


def threshold_facts() -> Mapping[str, tuple[Any, str, str]]:
    """Name -> (default, unit, help) of every threshold, for options and the reference page."""
    return {one.name: (one.default, one.metadata["unit"], one.metadata["help"]) for one in fields(Thresholds)}

"""The single declaration of the checks' thresholds, from which options of `diffsynth dataset validate` are generated.

Light to import: shells wait for it when they complete these options.
"""

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from diffsynth_core.data.resolution import MAX_UPSCALE, MIN_AREA_SHARE
from diffsynth_core.errors import Problem, raise_if_any

GENERAL_FACTOR = 16
"""Divisor of training sizes in all families."""


def _threshold(default: float, unit: str, help_text: str, least: float, most: float = math.inf) -> Any:
    """Declare one threshold, and its range."""
    return field(default=default, metadata={"unit": unit, "help": help_text, "least": least, "most": most})


def _out_of_range(threshold: Field[Any], value: float) -> Problem | None:
    least, most = threshold.metadata["least"], threshold.metadata["most"]
    if least <= value <= most:
        return None
    expected = f"{least:g} or more" if most == math.inf else f"a number from {least:g} to {most:g}"
    what = f"`--{threshold.name}` is {value:g}, expected {expected} ({threshold.metadata['unit']})"
    return Problem(what, "choose a number in this range", wrong_use=True)


@dataclass(frozen=True)
class Thresholds:
    """Limits beyond which checks report."""

    near_duplicate_distance: int = _threshold(
        3,
        "bits of 64",
        "Largest number of differing difference-hash bits for IMAGE_NEAR_DUPLICATE; -1: off",
        least=-1,
        most=64,
    )
    near_duplicate_colour: float = _threshold(
        12.0,
        "levels of 255",
        "Largest mean color difference of near duplicates, over an 8 x 8 grid",
        least=0,
    )
    max_aspect: float = _threshold(
        4.0, "ratio", "Largest ratio of the longer to the shorter side; above it: IMAGE_ASPECT", least=1
    )
    max_crop_loss: float = _threshold(
        0.2,
        "share",
        "Largest share of an image or video that may be cropped; above it: IMAGE_CROP_LOSS",
        least=0,
        most=1,
    )
    max_upscale: float = _threshold(
        MAX_UPSCALE,
        "factor",
        "Largest upscaling to a training or reference size; above it: IMAGE_UPSCALED",
        least=1,
    )
    min_area_share: float = _threshold(
        MIN_AREA_SHARE,
        "share",
        "Smallest share of the model's usual training area, or of `max_pixels` where that is less; below it: "
        "IMAGE_LOW_RESOLUTION. Not checked with a fixed size or without a recipe",
        least=0,
        most=1,
    )
    min_side: int = _threshold(
        GENERAL_FACTOR, "pixels", "Minimum side of an image or video; below it: IMAGE_TOO_SMALL", least=1
    )
    max_tokens: int = _threshold(
        512,
        "tokens",
        "Caption limit; above it: CAPTION_TOO_LONG. A recipe sets the limit of its text encoder",
        least=1,
    )
    file_timeout: float = _threshold(
        120.0, "seconds", "Time limit per file; a file that takes longer is reported as unreadable", least=0.001
    )

    def __post_init__(self) -> None:
        """Raises: FaultsFound: for values out of their range; NaN is in none."""
        raise_if_any([problem for one in fields(self) if (problem := _out_of_range(one, getattr(self, one.name)))])


def threshold_facts() -> Mapping[str, tuple[Any, str, str]]:
    """Return name -> (default, unit, help) of every threshold, for options and the reference page."""
    return {one.name: (one.default, one.metadata["unit"], one.metadata["help"]) for one in fields(Thresholds)}

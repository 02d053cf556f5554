"""LoRA files with weights, as users write them: `FILE`, `FILE:WEIGHT`, or `FILE:WEIGHT,WEIGHT,…`. No torch."""

import math
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.errors import DiffSynthError


@dataclass(frozen=True)
class WeightedFile:
    """A LoRA file and its factor."""

    path: Path
    weight: float = 1.0


def parse_lora(text: str) -> WeightedFile:
    """`FILE` or `FILE:WEIGHT`; a file whose whole name is `text` takes precedence.

    Raises:
        DiffSynthError: when the weight is not a finite number.
    """
    path, weights = parse_weights(text)
    if len(weights) > 1:
        if path.is_file():
            raise _not_finite(text)
        return WeightedFile(Path(text))
    return WeightedFile(path, weights[0])


def parse_weights(text: str) -> tuple[Path, tuple[float, ...]]:
    """`FILE`, `FILE:WEIGHT` or `FILE:WEIGHT,WEIGHT,…`; a file whose whole name is `text` takes precedence.

    Raises:
        DiffSynthError: when a weight is not a finite number.
    """
    path, colon, numbers = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), (1.0,)
    try:
        weights = tuple(map(float, numbers.split(",")))
    except ValueError:
        if not Path(path).is_file():
            return Path(text), (1.0,)  # a colon in the name of a file that does not exist
        weights = (math.nan,)
    if not all(map(math.isfinite, weights)):
        raise _not_finite(text)
    return Path(path), weights


def _not_finite(text: str) -> DiffSynthError:
    return DiffSynthError(f"`--lora` `{text}`: the weight is not a finite number", "use a number such as 0.8")

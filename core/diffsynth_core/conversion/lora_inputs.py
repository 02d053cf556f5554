"""LoRA files as `merge-lora` is given them: their weights, and what is told of each. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.conversion.bases import Base
from diffsynth_core.errors import DiffSynthError, list_names
from diffsynth_core.files import stem_of_shard
from diffsynth_core.weights.lora_files import LoraFile, read_lora_file
from diffsynth_core.weights.lora_rows import StoredLora
from diffsynth_core.weights.weight_sets import WeightSet, open_weights

TEXT_ENCODERS = ("lora_te", "text_encoder", "pipe.text_encoder")
"""How keys of LoRAs of text encoders begin in the dialects."""


@dataclass(frozen=True)
class WeightedFile:
    """A LoRA file and what it is multiplied by."""

    path: Path
    weight: float = 1.0


def parse_lora(text: str) -> WeightedFile:
    """`FILE` or `FILE:WEIGHT`; a file whose whole name is `text` is meant before all else.

    Raises:
        DiffSynthError: when the weight is no finite number.
    """
    path, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return WeightedFile(Path(text))
    try:
        weight = float(number)
    except ValueError:
        if not Path(path).is_file():
            return WeightedFile(Path(text))  # a colon in a name, which is then told to be not there
        weight = math.nan
    if not math.isfinite(weight):
        raise DiffSynthError(f"`--lora` `{text}`: the weight is not a finite number", "use a number such as 0.8")
    return WeightedFile(Path(path), weight)


def open_lora_file(path: Path) -> WeightSet:
    """The tensors of a LoRA, by headers.

    Raises:
        DiffSynthError: as `open_weights`, and for a shard, or what may hold more than one file.
    """
    if path.is_file() and stem_of_shard(path.name):
        raise DiffSynthError(
            f"`{path}` is one shard of a model, but a LoRA must be a single file",
            "pass a LoRA, or join its shards with `diffsynth split-ckpt --join`",
        )
    weights = open_weights([path])
    if weights.files != (path,):
        raise DiffSynthError(f"`{path}` is not a safetensors file, as a LoRA must be", "pass the file itself")
    return weights


@dataclass(frozen=True)
class LoraSummary:
    """What is told of one LoRA file.

    `matched`: how many LoRAs find their module. `unmatched`: keys that find none. `ranks`: those it has.
    `scales`: those of its modules, alpha / rank. `alpha`: where they come from, in words.
    `differences`: how many tensors it changes by a whole difference.
    """

    path: Path
    weight: float
    matched: int
    unmatched: tuple[str, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    alpha: str
    differences: int = 0


@dataclass(frozen=True)
class MatchedLora:
    """A LoRA file that fits a base."""

    file: LoraFile
    summary: LoraSummary

    @property
    def weight(self) -> float:
        return self.summary.weight


def match_lora(given: WeightedFile, base: Base, allow_unmatched: bool) -> MatchedLora:
    """A LoRA file against a base, by headers.

    Raises:
        DiffSynthError: as `open_weights` and `read_lora_file`; when keys find no module and that is not allowed.
    """
    keys = open_lora_file(given.path).tensors
    naming = base.component.lora_naming
    file = read_lora_file(given.path, base.shapes, naming, allow_unmatched=True, tensor_shapes=base.tensor_shapes)
    if file.unmatched and not allow_unmatched:
        encoder = sum(key.startswith(TEXT_ENCODERS) for key in file.unmatched)
        told = f", {encoder} of them for a text encoder" if encoder else ""
        raise DiffSynthError(
            f"`{given.path}`: {len(file.unmatched)} of {len(keys)} keys match no module of {base.title}{told}: "
            f"{list_names(sorted(file.unmatched))}",
            "pass a LoRA for this model, or skip these keys with `--allow_unmatched`",
        )
    return MatchedLora(file, summarise(given, file.loras, file.unmatched, len(file.tensors)))


def summarise(
    given: WeightedFile, loras: Sequence[StoredLora], unmatched: Sequence[str], differences: int = 0
) -> LoraSummary:
    """What is told of a file with these LoRAs."""
    return LoraSummary(
        path=given.path,
        weight=given.weight,
        matched=len(loras),
        unmatched=tuple(unmatched),
        ranks=tuple(sorted({lora.rank for lora in loras})),
        scales=tuple(sorted({lora.scale for lora in loras})),
        alpha=_alpha_rule(loras),
        differences=differences,
    )


def _alpha_rule(loras: Sequence[StoredLora]) -> str:
    origins = {lora.alpha_origin for lora in loras if lora.alpha_origin}
    if "stored" in origins:
        stored = sum(lora.alpha_origin == "stored" for lora in loras)
        return "stored" if stored == len(loras) else f"stored for {stored} of {len(loras)}, else alpha = rank"
    return ", ".join(sorted(origins)) or "alpha = rank"

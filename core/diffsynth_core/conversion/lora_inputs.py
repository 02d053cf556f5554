"""LoRA files as `merge-lora` is given them: their weights, and what is told of each. No torch."""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.conversion.bases import Base
from diffsynth_core.errors import DiffSynthError, shorten
from diffsynth_core.files import stem_of_shard
from diffsynth_core.state_dicts.headers import Header, read_header
from diffsynth_core.state_dicts.lora_files import LoraFile, LoraPart, read_lora_file
from diffsynth_core.state_dicts.weight_sets import WeightSet, open_weights

NUMBERS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}
"""Formats in which a single number is stored, as `struct` knows them; bfloat16 is the upper half of float32."""
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
        raise DiffSynthError(f"`--lora` `{text}`: the weight is no finite number", "give a number such as 0.8")
    return WeightedFile(Path(path), weight)


def open_lora_file(path: Path) -> WeightSet:
    """The tensors of a LoRA, by headers.

    Raises:
        DiffSynthError: as `open_weights`, and for a shard, or what may hold more than one file.
    """
    if path.is_file() and stem_of_shard(path.name):
        raise DiffSynthError(
            f"`{path}` is one shard of a model, and a LoRA is a file of its own",
            "name a LoRA, or join its shards with `diffsynth split-ckpt --join`",
        )
    weights = open_weights([path])
    if weights.files != (path,):
        raise DiffSynthError(f"`{path}` is no safetensors file, as a LoRA is", "name the file itself")
    return weights


@dataclass(frozen=True)
class LoraSummary:
    """What is told of one LoRA file.

    `matched`: how many LoRAs find their module. `unmatched`: keys that find none. `ranks`: those it has.
    `scales`: those of its modules, alpha / rank. `alpha`: where they come from, in words.
    """

    path: Path
    weight: float
    matched: int
    unmatched: tuple[str, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    alpha: str


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
    file = read_lora_file(given.path, base.shapes, base.component.lora_naming, allow_unmatched=True)
    if file.unmatched and not allow_unmatched:
        encoder = sum(key.startswith(TEXT_ENCODERS) for key in file.unmatched)
        told = f", {encoder} of them of a text encoder" if encoder else ""
        raise DiffSynthError(
            f"`{given.path}`: {len(file.unmatched)} of {len(keys)} keys fit no module of {base.title}{told}: "
            f"{shorten(sorted(file.unmatched))}",
            "name a LoRA of this model, or leave these keys out with `--allow_unmatched`",
        )
    return MatchedLora(file, summarise(given, file.parts, file.unmatched))


def summarise(given: WeightedFile, parts: Sequence[LoraPart], unmatched: Sequence[str]) -> LoraSummary:
    """What is told of a file with these LoRAs.

    Raises:
        DiffSynthError: when an alpha is no finite number.
    """
    header = read_header(given.path)
    scales = {_scale(given.path, header, part) for part in parts}
    return LoraSummary(
        path=given.path,
        weight=given.weight,
        matched=len(parts),
        unmatched=tuple(unmatched),
        ranks=tuple(sorted({part.rank for part in parts})),
        scales=tuple(sorted(scales)),
        alpha=_alpha_rule(parts),
    )


def _alpha_rule(parts: Sequence[LoraPart]) -> str:
    stored = sum(part.keys.alpha is not None for part in parts)
    if not stored:
        return "in the metadata" if any(part.stated != 1 for part in parts) else "alpha = rank"
    return "stored" if stored == len(parts) else f"stored for {stored} of {len(parts)}, else alpha = rank"


def _scale(path: Path, header: Header, part: LoraPart) -> float:
    if part.keys.alpha is None:
        return part.stated
    alpha = read_number(path, header, part.keys.alpha)
    if not math.isfinite(alpha):
        raise DiffSynthError(f"`{path}`: `{part.keys.alpha}` is no finite number", "write the file anew")
    return alpha / part.rank


def read_number(path: Path, header: Header, key: str) -> float:
    """The value of a tensor of one element.

    Raises:
        DiffSynthError: when it is stored in a format that no program uses for it.
    """
    dtype, (begin, end) = header.tensors[key].dtype, header.spans[key]
    with path.open("rb") as stream:
        stream.seek(begin)
        data = stream.read(end - begin)
    if dtype == "BF16":
        dtype, data = "F32", b"\0\0" + data
    if dtype not in NUMBERS:
        raise DiffSynthError(f"`{path}`: `{key}` is stored as {dtype}, expected a float", "write the file anew")
    return float(struct.unpack(NUMBERS[dtype], data)[0])

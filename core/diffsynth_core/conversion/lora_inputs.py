"""LoRA files as `merge-lora` takes them. No torch."""

from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.conversion.bases import Base
from diffsynth_core.errors import DiffSynthError, list_names
from diffsynth_core.files import stem_of_shard
from diffsynth_core.progress import pluralize, verb
from diffsynth_core.weights.lora import Lora
from diffsynth_core.weights.lora_files import read_lora_file
from diffsynth_core.weights.lora_formats import TEXT_ENCODER_PREFIXES
from diffsynth_core.weights.weight_sets import WeightSet, open_weights
from diffsynth_core.weights.weighted_files import WeightedFile


def open_lora_file(path: Path) -> WeightSet:
    """The tensors of a LoRA file, from its header.

    Raises:
        DiffSynthError: as `open_weights`, and for a shard, a folder or an index.
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
class WeightedLora:
    """A LoRA and its factor in a sum."""

    lora: Lora
    weight: float


def match_lora(given: WeightedFile, base: Base, allow_unmatched: bool) -> WeightedLora:
    """Match a LoRA file to a base, from headers.

    Raises:
        DiffSynthError: as `open_weights` and `read_lora_file`; when keys match no module and that is not allowed.
    """
    keys = open_lora_file(given.path).tensors
    naming = base.component.lora_naming
    lora = read_lora_file(given.path, base.shapes, naming, allow_unmatched=True, tensor_shapes=base.tensor_shapes)
    if lora.unmatched and not allow_unmatched:
        encoder = sum(key.startswith(TEXT_ENCODER_PREFIXES) for key in lora.unmatched)
        of_encoder = f", {encoder} of them for a text encoder" if encoder else ""
        raise DiffSynthError(
            f"`{given.path}`: {len(lora.unmatched)} of {pluralize(len(keys), 'key')} "
            f"{verb(len(lora.unmatched), 'matches', 'match')} no module of {base.title}{of_encoder}: "
            f"{list_names(sorted(lora.unmatched))}",
            "pass a LoRA for this model, or skip these keys with `--allow_unmatched`",
        )
    return WeightedLora(lora, given.weight)

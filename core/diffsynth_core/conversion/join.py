"""Joining of shards of one model, or of the parts of a split checkpoint: a plan from headers. No torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.conversion.plans import FilePlan
from diffsynth_core.conversion.row_spans import row_spans
from diffsynth_core.conversion.split import TAKEN_FROM, common_metadata, stem_of
from diffsynth_core.errors import DiffSynthError, list_names
from diffsynth_core.files import stem_of_shard
from diffsynth_core.json_files import InvalidJson, WrongType, as_type, parse_json
from diffsynth_core.progress import pluralize
from diffsynth_core.weights.dtypes import BITS_PER_ELEMENT
from diffsynth_core.weights.weight_sets import ENDING, INDEX_ENDING, WeightSet, open_weights
from diffsynth_core.weights.weight_writer import OutputFile, OutputTensor, aligned


@dataclass(frozen=True)
class SplitSource:
    """What a part was in the checkpoint from which it was split."""

    file: str
    prefix: str
    metadata: Mapping[str, str]


def plan_join(paths: Sequence[Path], folder: Path) -> FilePlan:
    """Plan one file from the shards of a model, or from the parts of a checkpoint, whose keys get their prefixes back.

    Raises:
        DiffSynthError: if the files do not belong together, or contain a tensor twice.
    """
    sets = _open(paths)
    parts = [_split_source(weights) for weights in sets]
    known = [part for part in parts if part]
    if len(known) == len(sets):
        return _join_parts(sets, known, folder)
    if len(sets) > 1:
        raise DiffSynthError(
            f"{list_names([weights.origin for weights in sets])} are not shards of one model, and not all of them are "
            "parts written by `diffsynth split-ckpt`",
            "pass the shards of one model, or its index",
        )
    (weights,) = sets
    metadata, notes = common_metadata(sets), []
    lost = sorted({key for texts in weights.metadata.values() for key in texts} - metadata.keys())
    if lost:
        notes.append(f"metadata dropped because the shards disagree on it: {list_names(lost)}")
    tensors = [row_spans(weights, name).output(name) for name in weights.tensors]
    output = OutputFile(folder / f"{stem_of(weights)}{ENDING}", aligned(tensors), metadata)
    return FilePlan((output,), weights.inputs, tuple(notes))


def _open(paths: Sequence[Path]) -> list[WeightSet]:
    """Return the weight sets of paths: shards by stem, all sets of a folder, any other file by itself."""
    listed = [item for path in paths for item in (_sets_in(path) if path.is_dir() else [path])]
    groups: dict[object, list[Path]] = {}
    for path in listed:
        stem = stem_of_shard(path.name)
        groups.setdefault((path.parent, stem) if stem else path, []).append(path)
    if len(groups) > 1 and not all(_split_source(open_weights(group)) for group in groups.values()):
        return [open_weights(listed)]
    return [open_weights(group) for group in groups.values()]


def _sets_in(folder: Path) -> list[Path]:
    """Return the indexes of a folder, and the safetensors files that are not shards of one."""
    indexes = sorted(folder.glob(f"*{INDEX_ENDING}"))
    stems = {path.name.removesuffix(INDEX_ENDING) for path in indexes}
    files = sorted(path for path in folder.glob(f"*{ENDING}") if not path.name.startswith("."))
    found = [*indexes, *(path for path in files if stem_of_shard(path.name) not in stems)]
    return found or [folder]


def _split_source(weights: WeightSet) -> SplitSource | None:
    """Return what a part's metadata states about its checkpoint; None if it states nothing readable."""
    try:
        found = as_type(parse_json(weights.metadata_value(TAKEN_FROM) or ""), SplitSource)
    except (InvalidJson, WrongType):
        return None
    return found if Path(found.file).name == found.file else None


def _join_parts(sets: Sequence[WeightSet], parts: Sequence[SplitSource], folder: Path) -> FilePlan:
    """Plan the checkpoint of the parts, with its tensors in the order in which checkpoints are written."""
    if len({(part.file, json.dumps(dict(part.metadata), sort_keys=True)) for part in parts}) > 1:
        raise DiffSynthError(
            f"{list_names([weights.origin for weights in sets])} are parts of different checkpoints",
            "pass the parts of one checkpoint",
        )
    tensors: dict[str, OutputTensor] = {}
    twice = []
    for weights, part in zip(sets, parts, strict=True):
        for name in weights.tensors:
            key = part.prefix + name
            twice += [key] if key in tensors else []
            tensors[key] = row_spans(weights, name).output(key)
    if twice:
        raise DiffSynthError(
            f"{pluralize(len(twice), 'tensor')} would be duplicated: {list_names(twice)}", "pass each part once"
        )
    order = sorted(tensors.values(), key=lambda tensor: (-BITS_PER_ELEMENT[tensor.dtype], tensor.name))
    output = OutputFile(folder / f"{parts[0].file}{ENDING}", tuple(order), parts[0].metadata)
    return FilePlan((output,), tuple(path for weights in sets for path in weights.inputs))

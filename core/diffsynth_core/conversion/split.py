"""Splitting of checkpoints by component, or by size alone: a plan from headers. No torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from diffsynth_core.config.choices import LoraFormat
from diffsynth_core.conversion.full_weights import Part, SplitChoices, common_prefix, counted, full_parts
from diffsynth_core.conversion.key_owners import (
    KeyOwners,
    find_owners,
    misnamed,
    read_origin,
    unmatched_problem,
)
from diffsynth_core.conversion.lora_source import open_lora
from diffsynth_core.conversion.lora_tensors import write_lora
from diffsynth_core.conversion.plans import DEFAULT_SHARD_SIZE, FilePlan
from diffsynth_core.conversion.row_spans import row_spans
from diffsynth_core.errors import DiffSynthError, Problem, raise_if_any
from diffsynth_core.files import stem_of_shard
from diffsynth_core.models.recognition import family_of_components
from diffsynth_core.models.spec import FamilyFacts
from diffsynth_core.weights.weight_sets import INDEX_ENDING, WeightSet
from diffsynth_core.weights.weight_writer import Output, OutputText, plan_shards

LORA_ENDING = ".lora"
"""Part of the file name of a component's LoRA."""
TAKEN_FROM = "taken_from"
"""Metadata key under which a part records what it was in the checkpoint, so that parts can be joined again."""


def plan_split(weights: WeightSet, folder: Path, choices: SplitChoices) -> FilePlan:
    """Plan `<component>.safetensors` and `<component>.lora.safetensors` for each component of a checkpoint.

    Raises:
        FaultsFound: if keys belong to no component or layout, or an option applies to nothing in the checkpoint.
    """
    origin = read_origin(weights, choices.family, choices.default_component)
    owners = find_owners(weights.tensors, origin)
    if owners.unmatched and not (choices.allow_unmatched and (owners.full or owners.lora)):
        raise_if_any([unmatched_problem(weights.origin, owners, len(weights.tensors))])
    raise_if_any(_without_effect(weights, owners, choices))
    family = origin.family or family_of_components(owners.full)
    raise_if_any(misnamed(owners.full, family))
    full, notes = full_parts(weights, owners, family, choices)
    parts = full + [
        _lora_part(weights, component, names, family, choices.lora_format) for component, names in owners.lora.items()
    ]
    if owners.unmatched:
        notes.append(f"skipped, not part of any component: {counted(owners.unmatched)}")
    outputs: list[Output] = []
    for part in sorted(parts, key=lambda part: part.stem):
        place = folder / part.stem
        shard_bytes = DEFAULT_SHARD_SIZE if part.config and not choices.max_shard_bytes else choices.max_shard_bytes
        metadata = _metadata(weights, part, family, choices)
        files, indexes = plan_shards(place.parent, place.name, part.tensors, metadata, shard_bytes)
        outputs += [*files, *indexes]
        outputs += [OutputText(place.parent / "config.json", part.config)] if part.config else []
    return FilePlan(tuple(outputs), weights.inputs, tuple(notes))


def _without_effect(weights: WeightSet, owners: KeyOwners, choices: SplitChoices) -> list[Problem]:
    """Return problems of options for full weights, or for LoRAs, that the checkpoint does not contain."""
    asked = (
        ("layout", choices.layout, "full weights", owners.full, "rename a LoRA with `--lora_format`"),
        ("dtype", choices.dtype, "full weights", owners.full, "remove `--dtype`"),
        ("lora_format", choices.lora_format, "LoRAs", owners.lora, "rename full weights with `--layout`"),
    )
    return [
        Problem(f"`--{option}` applies to {what}, but `{weights.origin}` contains none", hint, wrong_use=True)
        for option, name, what, found, hint in asked
        if name and not found
    ]


def plan_split_by_size(weights: WeightSet, folder: Path, max_shard_bytes: int) -> FilePlan:
    """Plan shards with at most `max_shard_bytes` of tensors, with unchanged names and metadata."""
    tensors = [row_spans(weights, name).output(name) for name in weights.tensors]
    files, indexes = plan_shards(folder, stem_of(weights), tensors, common_metadata([weights]), max_shard_bytes)
    return FilePlan((*files, *indexes), weights.inputs)


def stem_of(weights: WeightSet) -> str:
    """Return the name, without suffix, of a file with all tensors of a weight set."""
    if weights.index:
        return weights.index.name.removesuffix(INDEX_ENDING)
    name = weights.files[0].name
    return stem_of_shard(name) or name.removesuffix(".safetensors")


def common_metadata(sets: Sequence[WeightSet]) -> dict[str, str]:
    """Return the metadata that is equal in all files that have the key."""
    every = [metadata for weights in sets for metadata in weights.metadata.values()]
    keys = dict.fromkeys(key for metadata in every for key in metadata)
    found = {key: {metadata[key] for metadata in every if key in metadata} for key in keys}
    return {key: values.pop() for key, values in found.items() if len(values) == 1}


def _lora_part(
    weights: WeightSet,
    component: str,
    names: Mapping[str, str],
    family: FamilyFacts | None,
    lora_format: LoraFormat | None,
) -> Part:
    """Return the LoRA of a component, converted if requested.

    Raises:
        DiffSynthError: see `open_lora`; also if a LoRA to convert is spread over shards.
    """
    stem = component + LORA_ENDING
    if lora_format is None:
        return Part(
            component,
            stem,
            tuple(row_spans(weights, key).output(name) for name, key in names.items()),
            common_prefix(names),
        )
    path, *others = {weights.tensors[key].path for key in names.values()}
    if others:
        raise DiffSynthError(
            f"the LoRA of `{component}` is split across {len(others) + 1} files of `{weights.origin}`",
            "join them first with `--join`",
        )
    alone = replace(
        weights,
        files=(path,),
        tensors={key: weights.tensors[key] for key in names.values()},
        spans={key: weights.spans[key] for key in names.values()},
        metadata={path: weights.metadata[path]},
    )
    source = open_lora(alone, family.name if family else None, component)
    modules = source.lora.in_vocabulary(source.naming.vocabulary(lora_format))
    tensors = (write_lora(module, lora, lora_format).tensors for module, lora in modules.items())
    return Part(component, stem, tuple(chain.from_iterable(tensors)), None)


def _metadata(weights: WeightSet, part: Part, family: FamilyFacts | None, choices: SplitChoices) -> dict[str, str]:
    """Return the metadata of a part; transformers requires `format`."""
    metadata = {"format": "pt", "component": part.component}
    if family:
        metadata["family"] = family.name
    if part.prefix is not None:
        taken: dict[str, Any] = {
            "file": stem_of(weights),
            "prefix": part.prefix,
            "metadata": common_metadata([weights]),
        }
        metadata[TAKEN_FROM] = json.dumps(taken, sort_keys=True)
    lora_format = choices.lora_format or weights.metadata_value("lora_format")
    if part.stem.endswith(LORA_ENDING) and lora_format:
        metadata |= {"lora_component": part.component, "lora_format": lora_format}
    return metadata

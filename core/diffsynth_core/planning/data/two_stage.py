"""Two-stage training: the output folder of a precompute task, and the input folder of a train task. No torch."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffsynth_core.config.documents import format_value
from diffsynth_core.config.parameters import SETTINGS, Parameters
from diffsynth_core.config.resolve import Resolved
from diffsynth_core.config.tasks import TASKS, Task
from diffsynth_core.data.encoded_samples import (
    MANIFEST,
    EncodedSamples,
    holds_encoded_samples,
    read_encoded,
    unexpected_files,
)
from diffsynth_core.data.metadata import find_metadata
from diffsynth_core.errors import DiffSynthError, Problem, list_names, report
from diffsynth_core.models.spec import FamilyFacts, Variant
from diffsynth_core.planning.output.folder import folder_faults
from diffsynth_core.progress import pluralize, verb

UNSET: tuple[Any, ...] = (None, (), [])
"""Values of a parameter that is not set, as in Python and in JSON."""
SAME_PARAMETERS = "choose another `--output_path`, or encode with the same parameters"
"""Hint for an output folder whose samples were encoded with other parameters."""


def size_parameters(parameters: Parameters, variant: Variant) -> dict[str, Any]:
    """Return the parameters that determine the size and length at which samples are encoded."""
    return {
        name: getattr(parameters, name)
        for name, setting in SETTINGS.items()
        if setting.group == "size" and (variant.target.kind == "video" or not setting.for_video)
    }


def encoder_versions(variant: Variant) -> dict[str, list[Any]]:
    """Return encoder -> version and extra inputs, by which encodings of different variants differ."""
    return {encoder.name: [encoder.version, list(encoder.inputs)] for encoder in variant.encoders}


def encoding_components(variant: Variant) -> frozenset[str]:
    """Return the components that encode samples."""
    return frozenset(encoder.component for encoder in variant.encoders)


def components_of(task: Task, variant: Variant) -> frozenset[str]:
    """Return the components of a variant that a task loads."""
    encoding = encoding_components(variant)
    if not task.trains:
        return encoding
    return frozenset(variant.components) - (frozenset() if task.encodes else encoding)


def modified_encoders(parameters: Parameters, task: Task, variant: Variant) -> list[Problem]:
    """Return problems of parameters that train or modify encoders whose output is precomputed."""
    if task.encodes and task.trains:
        return []
    named = {"trainable_models": parameters.trainable_models, "lora_base_model": (parameters.lora_base_model,)}
    hints = dict.fromkeys(named, f"train it with `--task {task.objective}`, or remove it")
    if not task.encodes:
        named["preset_lora_model"] = (parameters.preset_lora_model,)
        hints["preset_lora_model"] = f"pass it to `{task.precompute_task}` instead"
    encoding = encoding_components(variant)
    return [
        Problem(
            f"`{parameter}` names `{component}`, but `{task.precompute_task}` precomputes the encodings of all samples with it",
            hints[parameter],
            wrong_use=True,
        )
        for parameter, components in named.items()
        for component in (name.partition(".")[0] for name in components if name)
        if component in encoding
    ]


def encoded_instead_of_dataset(parameters: Parameters) -> Problem | None:
    """Return the problem of a dataset folder that contains encoded samples, for a task that reads media."""
    folder, task = parameters.dataset_base_path, TASKS[parameters.task]
    if not holds_encoded_samples(folder):
        return None
    what = f"`dataset_base_path` `{folder}` contains encoded samples, but `{task.name}` reads images or videos"
    return Problem(what, f"train on them with `--task {task.train_task}`, or pass the dataset", wrong_use=True)


def find_encoded(resolved: Resolved) -> EncodedSamples | None:
    """Return the encoded samples for a train task; None if they are missing, incomplete or for another task.

    Reports problems.
    """
    parameters = resolved.parameters
    folder, task = parameters.dataset_base_path, TASKS[parameters.task]
    if parameters.dataset_metadata_path:
        what = f"`dataset_metadata_path` has no effect with `{task.name}`, which reads no metadata"
        report(Problem(what, "remove it", wrong_use=True))
    refusal = _not_encoded(folder, task)
    if refusal:
        report(refusal)
        return None
    try:
        encoded = read_encoded(folder)
    except DiffSynthError as error:
        report(*error.problems)
        return None
    if not encoded.complete or encoded.origin.objective != task.objective:
        report(_incomplete_or_other(encoded, task))
        return None
    report(*_damaged_files(encoded))
    report(*_other_values(resolved, encoded))
    report(*_without_empty_caption(parameters, encoded))
    if _same(parameters.output_path, folder):
        what = f"`output_path` is the folder `{folder}` of encoded samples that the run reads"
        report(Problem(what, "choose another `--output_path`", wrong_use=True))
    return encoded


def _not_encoded(folder: Path, task: Task) -> Problem | None:
    """Return why a folder contains no encoded samples; None if it does."""
    if holds_encoded_samples(folder):
        return None
    make = f"create them with `--task {task.precompute_task} --output_path {folder}`"
    if not folder.is_dir():
        what = f"the folder of encoded samples `{folder}` (`dataset_base_path`) does not exist"
        return Problem(what, make)
    if find_metadata(folder, None):
        what = f"`dataset_base_path` `{folder}` is a dataset, but `{task.name}` reads encoded samples"
        return Problem(
            what, f"encode it with `--task {task.precompute_task}`, or pass `--task {task.objective}`", wrong_use=True
        )
    what = f"`dataset_base_path` `{folder}` contains no encoded samples: `{MANIFEST}` is missing"
    return Problem(what, make, wrong_use=True)


def _incomplete_or_other(encoded: EncodedSamples, task: Task) -> Problem:
    """Return the problem of encoded samples that are incomplete or for another objective."""
    folder, made_by = encoded.folder, TASKS[encoded.origin.objective]
    if made_by.objective != task.objective:
        what = f"`{folder}` was written by `{made_by.precompute_task}`, but `{task.name}` reads the output of `{task.precompute_task}`"
        hint = f"pass `--task {made_by.train_task}`, or encode the dataset with `--task {task.precompute_task}`"
        return Problem(what, hint, wrong_use=True)
    what = f"precomputation in `{folder}` did not finish: `{task.precompute_task}` was interrupted"
    return Problem(what, f"run the command of `{task.precompute_task}` again to resume it")


def _damaged_files(encoded: EncodedSamples) -> list[Problem]:
    """Return problems of missing, truncated and unexpected files."""
    folder, expected = encoded.folder, dict(encoded.paths())
    faults = {
        ("is missing", "are missing"): [path for path in expected if not path.is_file()],
        ("has the wrong size", "have the wrong size"): [
            path for path, size in expected.items() if path.is_file() and path.stat().st_size != size
        ],
    }
    problems = [
        Problem(
            f"`{folder}`: {len(paths)} of {pluralize(len(expected), 'encoding')} {verb(len(paths), *what)}; the first is "
            f"`{paths[0].relative_to(folder)}`",
            "run the `:data_process` command again to encode what is missing",
        )
        for what, paths in faults.items()
        if paths
    ]
    unexpected = unexpected_files(folder, {*expected, folder / MANIFEST})
    if unexpected:
        what = f"`{folder}` contains {pluralize(len(unexpected), 'file')} besides its encoded samples: {list_names(unexpected)}"
        problems.append(Problem(what, "move them elsewhere, or encode into a separate folder"))
    return problems


def _other_values(resolved: Resolved, encoded: EncodedSamples) -> list[Problem]:
    """Return problems of flags and config values that differ from those that the samples were encoded with.

    Values of a recipe are ignored: a recipe serves both stages.
    """
    origin, parameters = encoded.origin, resolved.parameters
    made: dict[str, Any] = {**origin.sizes, "extra_inputs": tuple(origin.extra_inputs)}
    return [
        Problem(
            f"`{name}` is `{format_value(getattr(parameters, name))}`, but the samples in `{encoded.folder}` were "
            f"encoded {'without it' if value in UNSET else f'with `{format_value(value)}`'}",
            "remove it, or encode them again",
            wrong_use=True,
        )
        for name, value in made.items()
        if resolved.origin(name).kind in ("config", "flag")
        if getattr(parameters, name) != value
    ]


def _without_empty_caption(parameters: Parameters, encoded: EncodedSamples) -> list[Problem]:
    """Return the problem of samples without the encoding that `caption_dropout` takes."""
    if not parameters.caption_dropout or encoded.with_empty_caption:
        return []
    dropout = format_value(parameters.caption_dropout)
    what = f"`caption_dropout` is `{dropout}`, but the samples in `{encoded.folder}` were encoded without the empty caption"
    task = TASKS[parameters.task].precompute_task
    add = f"run the command of `{task}` again with `--caption_dropout {dropout}`, which adds it, or remove it"
    return [Problem(what, add, wrong_use=True)]


def kind_problems(encoded: EncodedSamples, facts: FamilyFacts, variant: Variant) -> list[Problem]:
    """Return why samples encoded for one variant cannot train another."""
    origin = encoded.origin
    if origin.family == facts.name and origin.encoders == encoder_versions(variant):
        return []
    what = f"the samples in `{encoded.folder}` were encoded for {origin.kind}, but the model is {variant.title}"
    return [Problem(what, "use a model of that kind, or encode them for this one", wrong_use=True)]


def known_origin(parameters: Parameters, variant: Variant, mixed_precision: str, fingerprint: str) -> dict[str, Any]:
    """Return the part of `Origin` that is known before files are hashed, by field name."""
    return {
        "objective": TASKS[parameters.task].objective,
        "kind": variant.title,
        "encoders": encoder_versions(variant),
        "extra_inputs": list(parameters.extra_inputs),
        "sizes": size_parameters(parameters, variant),
        "precision": mixed_precision,
        "dataset_fingerprint": fingerprint,
    }


def check_precompute_output(parameters: Parameters, now: Mapping[str, Any]) -> None:
    """Check that the output folder of a precompute task is empty or contains the same samples; report otherwise.

    Args:
        now: the part of their origin that is known before files are hashed.
    """
    folder = parameters.output_path
    faults = folder_faults(folder, "output_path")
    report(*faults)
    if faults or not folder.is_dir():
        return
    if not holds_encoded_samples(folder):
        if unexpected_files(folder, set()):
            what = f"`output_path` `{folder}` is not empty and contains no encoded samples"
            report(Problem(what, "choose another `--output_path`", wrong_use=True))
        return
    try:
        encoded = read_encoded(folder)
    except DiffSynthError as error:
        report(*error.problems)
        return
    origin = encoded.origin
    before = origin.sizes | {name: getattr(origin, name) for name in now if name != "sizes"}
    after = now["sizes"] | {name: value for name, value in now.items() if name != "sizes"}
    for name, value in after.items():
        if before.get(name) != value:
            what = f"`output_path` `{folder}` contains samples encoded with other parameters: {_difference(name, before.get(name), value)}"
            report(Problem(what, SAME_PARAMETERS, wrong_use=True))
            return
    if encoded.with_empty_caption and not parameters.caption_dropout:
        what = f"`output_path` `{folder}` contains samples encoded with `caption_dropout`, now it is `0`"
        report(Problem(what, SAME_PARAMETERS, wrong_use=True))


def _difference(name: str, before: Any, after: Any) -> str:
    """Return a difference between two origins, in words."""
    if name == "dataset_fingerprint":
        return "the dataset has changed"
    if name == "encoders":
        return "they were encoded for another kind of model"
    return f"`{name}` was {_value_or_unset(before)}, now it is {_value_or_unset(after)}"


def _value_or_unset(value: Any) -> str:
    return "not set" if value in UNSET else f"`{format_value(value)}`"


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)

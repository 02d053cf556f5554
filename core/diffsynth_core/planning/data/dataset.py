"""The dataset of a run, checked as far as headers and, for videos, frame counts allow."""

from collections.abc import Mapping
from dataclasses import replace

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.data.columns import unread_column
from diffsynth_core.data.metadata import Metadata, read_metadata
from diffsynth_core.data.rows import Rows, read_rows
from diffsynth_core.data.samples import SampleSet, build_samples
from diffsynth_core.data.video_probe_cache import VideoProbeCache
from diffsynth_core.errors import DiffSynthError, Problem, list_names
from diffsynth_core.files import default_cache_path
from diffsynth_core.models.dataset_columns import (
    column_hints,
    columns_of_run,
    media_rule,
    setting_problems,
    shown_frames,
)
from diffsynth_core.models.spec import FamilyFacts, Variant
from diffsynth_core.planning.data.two_stage import encoded_instead_of_dataset
from diffsynth_core.progress import Reporter, pluralize


def read_dataset(
    parameters: Parameters, facts: FamilyFacts, variant: Variant, reporter: Reporter
) -> tuple[SampleSet | None, list[Problem]]:
    """Return the samples of the dataset (None if they cannot be determined), and all problems."""
    target, given = variant.target, parameters.dataset_metadata_path
    problems = [*setting_problems(parameters, variant), *_idle_parameters(parameters, facts)]
    encoded = encoded_instead_of_dataset(parameters)
    if encoded:
        return None, [*problems, encoded]
    try:
        metadata = read_metadata(parameters.dataset_base_path, given, facts.text_column, target.column, target.kind)
    except DiffSynthError as error:
        return None, [*problems, *error.problems]
    rows = read_rows(metadata, columns_of_run(parameters, facts, variant), "named")
    problems += rows.problems()
    if not rows.records or any(one.code == "COLUMN_MISSING" for one in rows.findings):
        return None, problems
    videos = VideoProbeCache((parameters.cache_path or default_cache_path()) / "videos.jsonl")
    samples, of_files = build_samples(rows, media_rule(parameters, target), videos, reporter)
    problems += [*of_files, *_nothing_to_learn(samples, metadata, variant)]
    notes = (*metadata.notes, *samples.notes, *_shown_whole(samples, parameters, variant))
    warnings = (*_unread_columns(rows, column_hints(parameters, facts, variant)), *samples.warnings)
    return replace(samples, notes=notes, warnings=warnings) if samples.samples else None, problems


class MissingDataset(Problem):
    """The dataset folder does not exist."""


def missing_dataset(parameters: Parameters) -> list[Problem]:
    """Return the problem of a missing dataset folder, if nothing else is known about the dataset."""
    base = parameters.dataset_base_path
    if base.is_dir():
        return []
    what = f"the dataset folder `{base}` (`dataset_base_path`) does not exist"
    return [MissingDataset(what, "pass the folder with `--dataset_base_path`")]


def _unread_columns(rows: Rows, hints: Mapping[str, str]) -> list[Problem]:
    """Return COLUMN_UNKNOWN: each column that may have been meant separately, and all others together."""
    origin, unread = rows.metadata.origin, rows.columns.unknown(rows.metadata.columns)
    meant = [unread_column(origin, name, rows.columns, hints[name]) for name in unread if name in hints]
    problems = [Problem(one.message, one.hint, code=one.code) for one in meant]
    others = [name for name in unread if name not in hints]
    if others:
        problems.append(Problem(f"`{origin}` has unused columns: {list_names(others)}", code="COLUMN_UNKNOWN"))
    return problems


def _idle_parameters(parameters: Parameters, facts: FamilyFacts) -> list[Problem]:
    """Yield parameters that have no effect without an extra input that is not requested."""
    needed = {name: setting for component in facts.components for name, setting in component.settings.items()}
    needed |= {name: tokenizer.inputs for name, tokenizer in facts.tokenizers.items() if tokenizer.inputs}
    return [
        Problem(
            f"`{name}` requires the extra input `{inputs[0]}`",
            f"remove it, or pass `--extra_inputs {inputs[0]}`",
            wrong_use=True,
        )
        for name, inputs in needed.items()
        if getattr(parameters, name) and not set(inputs) & set(parameters.extra_inputs)
    ]


def _shown_whole(samples: SampleSet, parameters: Parameters, variant: Variant) -> list[str]:
    """Return notes about single frames that are the condition and the target at once."""
    single = sum(sample.frames == 1 for sample in samples.samples)
    shown = ", ".join(shown_frames(parameters, variant))
    if not single or not shown:
        return []
    return [
        f"{pluralize(single, 'sample')} with a single frame: the model is conditioned on all of it ({shown}) and learns to copy it"
    ]


def _nothing_to_learn(samples: SampleSet, metadata: Metadata, variant: Variant) -> list[Problem]:
    """Return the problem of samples all of whose frames are conditions."""
    if not variant.num_conditioning_frames:
        return []
    return [
        Problem(
            f"`{metadata.origin}` {sample.name} has one frame, and {variant.title} conditions on the first frame: "
            "nothing is left to predict",
            'remove the row, or train without this condition: `--extra_inputs ""`',
            code="VIDEO_TOO_SHORT",
        )
        for sample in samples.samples
        if (sample.frames - 1) // variant.target.frame_step < variant.num_conditioning_frames
    ]

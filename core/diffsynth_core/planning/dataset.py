"""The dataset of a run, checked as far as headers and, for videos, counts of frames tell."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.tasks import TASKS
from diffsynth_core.data.images import SizeRule
from diffsynth_core.data.media import FrameRule, MediaRule, ReferenceRule
from diffsynth_core.data.metadata import LEAVE_OUT, Metadata, read_metadata, unread_column
from diffsynth_core.data.samples import Columns, SampleSet, build_samples, check_columns
from diffsynth_core.data.video_probe_cache import VideoProbeCache
from diffsynth_core.errors import DiffSynthError, Problem, list_names, suggest
from diffsynth_core.files import default_cache_path
from diffsynth_core.models.registry import FRAME_INPUTS, LATER_INPUTS, REFERENCE_COLUMNS
from diffsynth_core.models.spec import FamilyFacts, TargetSpec, Variant
from diffsynth_core.planning.two_stage import encoded_instead_of_dataset
from diffsynth_core.progress import Reporter, pluralize


@dataclass(frozen=True)
class RowFault:
    """A fault of the dataset; `row`: the one whose files are not to be opened for it."""

    problem: Problem
    row: int | None = None


DatasetCheck = Callable[[Parameters, FamilyFacts, Variant], list[RowFault]]
"""What looks for faults before the samples are made, such as validation's `quick_check`."""


def no_check(parameters: Parameters, facts: FamilyFacts, variant: Variant) -> list[RowFault]:
    """For plans of datasets that have been checked."""
    return []


def read_dataset(
    parameters: Parameters,
    facts: FamilyFacts,
    variant: Variant,
    reporter: Reporter,
    problems: list[Problem],
    check: DatasetCheck = no_check,
) -> SampleSet | None:
    """The samples of the dataset; None when there is no telling them. Adds to `problems`."""
    target = variant.target
    problems += setting_problems(parameters, variant)
    problems += _idle_parameters(parameters, facts)
    base = parameters.dataset_base_path
    encoded = encoded_instead_of_dataset(parameters)
    if encoded:
        problems.append(encoded)
        return None
    try:
        metadata = read_metadata(base, parameters.dataset_metadata_path, facts.text_column, target.column, target.kind)
    except DiffSynthError as error:
        problems += error.problems
        return None
    of_objective = TASKS[parameters.task].columns
    columns = Columns(
        facts.text_column,
        target.column,
        media_rule(parameters, target),
        reference_rules(parameters, variant),
        sampled=bool(of_objective),
    )
    faults = check_columns(metadata, columns.text, columns.media, of_objective)
    problems += faults
    if faults:
        return None
    row_faults = check(parameters, facts, variant)
    problems += [fault.problem for fault in row_faults]
    refused = frozenset(fault.row for fault in row_faults if fault.row is not None)
    videos = VideoProbeCache((parameters.cache_path or default_cache_path()) / "videos.jsonl")
    samples, row_problems = build_samples(metadata, base, columns, videos, reporter, refused)
    problems += row_problems
    problems += _nothing_to_learn(samples, variant)
    notes = (*metadata.notes, *samples.notes, *_shown_whole(samples, parameters, variant))
    known = (columns.text, *columns.media, *of_objective)
    warnings = (*_unread_columns(metadata, known, column_hints(parameters, facts, variant)), *samples.warnings)
    return replace(samples, notes=notes, warnings=warnings) if samples.samples else None


def setting_problems(parameters: Parameters, variant: Variant) -> list[Problem]:
    """Parameters that decide how the dataset is read, and that this kind of model cannot be trained with."""
    return [
        *_size_problems(parameters, variant),
        *_input_problems(parameters, variant),
        *_file_key_problems(parameters, variant),
    ]


class MissingDataset(Problem):
    """The problem that the dataset folder does not exist."""


def missing_dataset(parameters: Parameters) -> list[Problem]:
    """The problem that the dataset folder is not there, for when nothing else can be told of the dataset."""
    base = parameters.dataset_base_path
    if base.is_dir():
        return []
    what = f"the dataset folder `{base}` (`dataset_base_path`) does not exist"
    return [MissingDataset(what, "pass the folder with `--dataset_base_path`")]


def media_rule(parameters: Parameters, target: TargetSpec) -> MediaRule:
    """How the files that are trained on are read."""
    size = SizeRule(parameters.height, parameters.width, parameters.max_pixels, target.size_factor)
    # A fixed size was chosen, as was an area below the usual one.
    usual = 0 if parameters.height and parameters.width else min(target.usual_pixels, parameters.max_pixels)
    frames = FrameRule(
        parameters.num_frames, target.frame_step, parameters.frame_rate, parameters.clip_start, parameters.seed
    )
    return MediaRule(size, frames if target.kind == "video" else None, usual)


def reference_rules(parameters: Parameters, variant: Variant) -> tuple[ReferenceRule, ...]:
    """How reference images are read, none above what `max_pixels` allows."""
    return tuple(
        ReferenceRule(shown.name, shown.column, shown.size, parameters.max_pixels, shown.factor, shown.most)
        for shown in variant.references
    )


def shown_frames(parameters: Parameters, variant: Variant) -> tuple[str, ...]:
    """The extra inputs that show a model of videos frames which it must bring forth all the same."""
    if variant.target.kind != "video" or variant.num_conditioning_frames:
        return ()
    return tuple(parameters.extra_inputs)


def column_hints(parameters: Parameters, facts: FamilyFacts, variant: Variant) -> Mapping[str, str]:
    """Column -> what makes it be read, or why nothing does, for columns that this run does not read."""
    hints = dict.fromkeys(REFERENCE_COLUMNS, f"other families read it; {LEAVE_OUT}")
    hints |= dict.fromkeys(LATER_INPUTS, f"this condition is not supported yet; {LEAVE_OUT}")
    hints |= {
        name: f"`{name}` is a frame of the clip itself, enabled with `--extra_inputs`; the column can be removed"
        for name in FRAME_INPUTS
    }
    objective = next(name for name, task in TASKS.items() if task.columns)
    hints |= dict.fromkeys(TASKS[objective].columns, f"`--task {objective}` reads it")
    for name in facts.reference_columns:
        inputs = tuple(dict.fromkeys((*parameters.extra_inputs, name)))
        keys = dict.fromkeys((*parameters.data_file_keys, name))
        together = set(inputs) <= set(facts.variant({}, inputs, "").conditions)
        hints[name] = (
            f"to train on it, pass `--data_file_keys {','.join(keys)} --extra_inputs {','.join(inputs)}`"
            if name in variant.conditions and together
            else f"{variant.title} does not read it; {LEAVE_OUT}"
        )
    return hints


def _unread_columns(metadata: Metadata, known: Sequence[str], hints: Mapping[str, str]) -> list[Problem]:
    """What to say of columns that are not read: each that may have been meant, and all others at once."""
    unread = [name for name in metadata.columns if name and name not in known]
    meant = [unread_column(metadata.origin, name, known, hints[name]) for name in unread if name in hints]
    others = [name for name in unread if name not in hints]
    if others:
        what = f"`{metadata.origin}` has unused columns: {list_names(others)}"
        meant.append(Problem(what, code="COLUMN_UNKNOWN"))
    return meant


def _file_key_problems(parameters: Parameters, variant: Variant) -> list[Problem]:
    """Columns of files that the model needs and that `data_file_keys` leaves out."""
    needed = dict.fromkeys((variant.target.column, *(shown.column for shown in variant.references)))
    keys = dict.fromkeys((*parameters.data_file_keys, *needed))
    return [
        Problem(
            f"`data_file_keys` does not include `{column}`, whose files this run reads",
            f"pass `--data_file_keys {','.join(keys)}`",
            wrong_use=True,
        )
        for column in needed
        if column not in parameters.data_file_keys
    ]


def _size_problems(parameters: Parameters, variant: Variant) -> list[Problem]:
    """Sides and numbers of frames that the model cannot take."""
    problems = []
    factor, step = variant.target.size_factor, variant.target.frame_step
    for side in ("height", "width"):
        value = getattr(parameters, side)
        if value is not None and value % factor:
            nearest = max(factor, value // factor * factor)
            problems.append(
                Problem(
                    f"`{side}` {value} is not a multiple of {factor}, which {variant.title} requires",
                    f"pass `--{side} {nearest}`",
                    wrong_use=True,
                )
            )
    if variant.target.kind == "video" and parameters.num_frames % step != 1:
        nearest = max(0, parameters.num_frames - 1) // step * step + 1
        problems.append(
            Problem(
                f"`num_frames` {parameters.num_frames} is not of the form {step}n + 1, which {variant.title} requires",
                f"pass `--num_frames {nearest}` or `{nearest + step}`",
                wrong_use=True,
            )
        )
    return problems


def _input_problems(parameters: Parameters, variant: Variant) -> list[Problem]:
    """Extra inputs that the model does not take, those it cannot do without, and parameters that need one to matter."""
    problems = []
    of_objective = TASKS[parameters.task].columns
    for name in parameters.extra_inputs:
        if name not in (*variant.conditions, *of_objective):
            near = suggest(name, set(variant.conditions) - set(parameters.extra_inputs))
            known = f"it takes {', '.join(variant.conditions)}" if variant.conditions else "remove it"
            hint = f"did you mean `{near}`?" if near else known
            problems.append(
                Problem(f"`extra_inputs` names `{name}`, which {variant.title} does not support", hint, wrong_use=True)
            )
    problems += [
        Problem(
            f"`extra_inputs` lacks `{name}`, which {variant.title} requires",
            f"pass `--extra_inputs {','.join((*parameters.extra_inputs, name))}`",
            wrong_use=True,
        )
        for name in variant.required_conditions
        if name not in parameters.extra_inputs
    ]
    return problems


def _idle_parameters(parameters: Parameters, facts: FamilyFacts) -> list[Problem]:
    """Parameters that were given and that matter only to a model which is shown something that was not asked for."""
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
    """What to say of single frames that the model is shown, and need only copy."""
    single = sum(sample.frames == 1 for sample in samples.samples)
    shown = ", ".join(shown_frames(parameters, variant))
    if not single or not shown:
        return []
    return [
        f"{pluralize(single, 'sample')} with a single frame: the model is conditioned on all of it ({shown}) and learns to copy it"
    ]


def _nothing_to_learn(samples: SampleSet, variant: Variant) -> list[Problem]:
    """Samples whose frames the model is all given."""
    if not variant.num_conditioning_frames:
        return []
    return [
        Problem(
            f"{sample.name} has one frame, and {variant.title} conditions on the first frame: nothing is left to predict",
            'remove the row, or train without this condition: `--extra_inputs ""`',
            code="VIDEO_TOO_SHORT",
        )
        for sample in samples.samples
        if (sample.frames - 1) // variant.target.frame_step < variant.num_conditioning_frames
    ]

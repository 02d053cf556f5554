"""The dataset of a run, checked as far as headers and, for videos, counts of frames tell."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.tasks import TASKS
from diffsynth_core.data.media import FrameRule, MediaRule, ReferenceRule
from diffsynth_core.data.metadata import read_metadata
from diffsynth_core.data.pictures import SizeRule
from diffsynth_core.data.samples import Columns, SampleSet, build_samples, check_columns
from diffsynth_core.data.video_memory import VideoMemory
from diffsynth_core.errors import DiffSynthError, Problem, suggest
from diffsynth_core.families.interface import FamilyFacts, Medium, Variant
from diffsynth_core.files import default_cache_path
from diffsynth_core.planning.halves import encoded_in_place_of_dataset
from diffsynth_core.progress import Reporter, count_of


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
    medium = variant.medium
    problems += _size_problems(parameters, variant)
    problems += _input_problems(parameters, variant)
    problems += _idle_parameters(parameters, facts)
    base = parameters.dataset_base_path
    encoded = encoded_in_place_of_dataset(parameters)
    if encoded:
        problems.append(encoded)
        return None
    try:
        metadata = read_metadata(base, parameters.dataset_metadata_path, facts.text_column, medium.column, medium.kind)
    except DiffSynthError as error:
        problems += error.problems
        return None
    of_objective = TASKS[parameters.task].columns
    columns = Columns(
        facts.text_column,
        medium.column,
        media_rule(parameters, medium),
        reference_rules(parameters, variant),
        sampled=bool(of_objective),
    )
    faults = check_columns(metadata, columns.text, columns.media, parameters.data_file_keys, of_objective)
    problems += faults
    if faults:
        return None
    row_faults = check(parameters, facts, variant)
    problems += [fault.problem for fault in row_faults]
    refused = frozenset(fault.row for fault in row_faults if fault.row is not None)
    videos = VideoMemory((parameters.cache_path or default_cache_path()) / "videos.jsonl")
    samples, row_problems = build_samples(metadata, base, columns, videos, reporter, refused)
    problems += row_problems
    problems += _nothing_to_learn(samples, variant)
    notes = (*metadata.notes, *samples.notes, *_shown_whole(samples, parameters, variant))
    return replace(samples, notes=notes) if samples.samples else None


class MissingDataset(Problem):
    """The problem that the dataset folder does not exist."""


def missing_dataset(parameters: Parameters) -> list[Problem]:
    """The problem that the dataset folder is not there, for when nothing else can be told of the dataset."""
    base = parameters.dataset_base_path
    if base.is_dir():
        return []
    what = f"the dataset folder `{base}` (`dataset_base_path`) is not there"
    return [MissingDataset(what, "name the folder with `--dataset_base_path`")]


def media_rule(parameters: Parameters, medium: Medium) -> MediaRule:
    """How the files that are trained on are read."""
    size = SizeRule(parameters.height, parameters.width, parameters.max_pixels, medium.size_factor)
    if medium.kind == "picture":
        return MediaRule(size)
    return MediaRule(
        size,
        FrameRule(
            parameters.num_frames, medium.frame_step, parameters.frame_rate, parameters.clip_start, parameters.seed
        ),
    )


def reference_rules(parameters: Parameters, variant: Variant) -> tuple[ReferenceRule, ...]:
    """How reference pictures are read, none above what `max_pixels` allows."""
    return tuple(
        ReferenceRule(shown.name, shown.column, shown.size, parameters.max_pixels, shown.factor, shown.most)
        for shown in variant.references
    )


def shown_frames(parameters: Parameters, variant: Variant) -> tuple[str, ...]:
    """The extra inputs that show a model of videos frames which it must bring forth all the same."""
    if variant.medium.kind != "video" or variant.given_frames:
        return ()
    return tuple(parameters.extra_inputs)


def _size_problems(parameters: Parameters, variant: Variant) -> list[Problem]:
    """Sides and numbers of frames that the model cannot take."""
    problems = []
    factor, step = variant.medium.size_factor, variant.medium.frame_step
    for side in ("height", "width"):
        value = getattr(parameters, side)
        if value is not None and value % factor:
            nearest = max(factor, value // factor * factor)
            problems.append(
                Problem(
                    f"`{side}` {value} is not a multiple of {factor}, which {variant.title} needs",
                    f"give `--{side} {nearest}`",
                    wrong_use=True,
                )
            )
    if variant.medium.kind == "video" and parameters.num_frames % step != 1:
        nearest = max(0, parameters.num_frames - 1) // step * step + 1
        problems.append(
            Problem(
                f"`num_frames` {parameters.num_frames} is not a multiple of {step} and one more, which {variant.title} needs",
                f"give `--num_frames {nearest}` or `{nearest + step}`",
                wrong_use=True,
            )
        )
    return problems


def _input_problems(parameters: Parameters, variant: Variant) -> list[Problem]:
    """Extra inputs that the model does not take, those it cannot do without, and parameters that need one to matter."""
    problems = []
    of_objective = TASKS[parameters.task].columns
    for name in parameters.extra_inputs:
        if name not in (*variant.takes, *of_objective):
            near = suggest(name, set(variant.takes) - set(parameters.extra_inputs))
            known = f"it takes {', '.join(variant.takes)}" if variant.takes else "leave it out"
            hint = f"did you mean `{near}`?" if near else known
            problems.append(
                Problem(f"`extra_inputs` names `{name}`, which {variant.title} does not take", hint, wrong_use=True)
            )
    problems += [
        Problem(
            f"`extra_inputs` lacks `{name}`, which {variant.title} cannot do without",
            f"give `--extra_inputs {','.join((*parameters.extra_inputs, name))}`",
            wrong_use=True,
        )
        for name in variant.needs
        if name not in parameters.extra_inputs
    ]
    return problems


def _idle_parameters(parameters: Parameters, facts: FamilyFacts) -> list[Problem]:
    """Parameters that were given and that matter only to a model which is shown something that was not asked for."""
    needed = {name: setting for component in facts.components for name, setting in component.settings.items()}
    needed |= {name: tokenizer.inputs for name, tokenizer in facts.tokenizers.items() if tokenizer.inputs}
    return [
        Problem(
            f"`{name}` means nothing without the extra input `{inputs[0]}`",
            f"leave it out, or give `--extra_inputs {inputs[0]}`",
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
    return [f"{count_of(single, 'sample')} of one frame: the model is shown it whole ({shown}) and learns to copy it"]


def _nothing_to_learn(samples: SampleSet, variant: Variant) -> list[Problem]:
    """Samples whose frames the model is all given."""
    if not variant.given_frames:
        return []
    return [
        Problem(
            f"{sample.name} is one frame, which {variant.title} is given: nothing is left to learn",
            'take the row out, or train without it: `--extra_inputs ""`',
            code="VIDEO_TOO_SHORT",
        )
        for sample in samples.samples
        if (sample.frames - 1) // variant.medium.frame_step < variant.given_frames
    ]

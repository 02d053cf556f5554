"""What a run draws while it goes on, and when. No torch."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.tasks import TASKS
from diffsynth_core.data.samples import Sample, SampleSet
from diffsynth_core.errors import Problem, list_names, report
from diffsynth_core.models.registry import image_inputs
from diffsynth_core.models.spec import Variant
from diffsynth_core.planning.drawing.dataset_prompts import prompts_of_dataset
from diffsynth_core.planning.drawing.jobs import GenerationJob, ImageSize, JobDefaults, SamplingChoice
from diffsynth_core.planning.drawing.prompt_images import ImageChecks
from diffsynth_core.planning.drawing.prompts import SUFFIXES, PromptRow, read_prompts, rows_of_options
from diffsynth_core.planning.model.model_plan import ModelPlan
from diffsynth_core.planning.training.targets import Training

DATASET = "dataset"
"""Value of `preview_prompts` that stands for the captions of the dataset."""
OPTION = "--preview_prompts"
REMOVE = f"remove `{OPTION}`, and draw the checkpoints with `diffsynth generate`"
"""Hint where a run cannot draw previews."""


def preview_option_problems(parameters: Parameters) -> Iterator[Problem]:
    """Yield what is wrong with the parameters of previews, whatever the model and the dataset."""
    task = TASKS[parameters.task]
    if parameters.preview_prompts is None:
        for name in ("preview_every", "preview_steps"):
            if getattr(parameters, name) is not None:
                what = f"`{name}` draws nothing without `preview_prompts`"
                yield Problem(what, f"pass `{OPTION}`, or remove `--{name}`", wrong_use=True)
    elif not (task.encodes and task.trains):
        what = f"`preview_prompts` needs encoders, denoiser and VAE in one run, but `{task.name}` is one of two stages"
        yield Problem(what, REMOVE, wrong_use=True)


def plan_previews(
    parameters: Parameters, found: ModelPlan | None, training: Training | None, samples: SampleSet | None
) -> tuple[GenerationJob, ...]:
    """Return what a run draws, in the order of the prompts; empty without `preview_prompts`. Reports problems.

    The noise of each is that of the run's seed plus its place from 0, unless the prompts file has a seed for it.

    Args:
        found, training, samples: None if they have faults; then some problems are not found.
    """
    task = TASKS[parameters.task]
    if parameters.preview_prompts is None or not (task.encodes and task.trains and found and training):
        return ()
    if refused := list(_model_problems(found, training)):
        report(*refused)
        return ()
    given = samples.samples if samples else ()
    rows = list(_with_inputs_of_run(_read_rows(parameters, found, given), parameters.extra_inputs))
    defaults = JobDefaults(
        variant=found.variant,
        size=_usual_size(given, found.variant),
        seed=parameters.seed,
        choice=SamplingChoice(steps=parameters.preview_steps),
    )
    report(*_unused_negative_prompts(rows, defaults))
    needed = [name for name in parameters.extra_inputs if name in image_inputs()]
    ImageChecks(found.facts, found.variant, needed, parameters.max_pixels, _way_out).check(rows, {})
    return tuple(defaults.job(row, number) for number, row in enumerate(rows))


def _model_problems(found: ModelPlan, training: Training) -> Iterator[Problem]:
    """Yield why what trains cannot draw."""
    variant = found.variant
    if variant.sampling.boundary is not None:
        what = f"`preview_prompts`: {variant.title} draws with two transformers, and this run has one of them"
        yield Problem(what, REMOVE, wrong_use=True)
    around = {encoder.component for encoder in variant.encoders} & training.components
    if around:
        trains = f"{list_names(sorted(around))} {'trains' if len(around) == 1 else 'train'}"
        what = f"`preview_prompts` encodes prompts once and decodes with the VAE of the files, but {trains}"
        yield Problem(what, REMOVE, wrong_use=True)


def _read_rows(parameters: Parameters, found: ModelPlan, samples: Sequence[Sample]) -> list[PromptRow]:
    """Return the prompts, and what each sets for itself."""
    named = parameters.preview_prompts or ""
    if named == DATASET:
        way_out = f"pass a prompt or a file of prompts as `{OPTION}`"
        return prompts_of_dataset(parameters, found, (), way_out) if samples else []
    if _is_file(named):
        return read_prompts(Path(named), OPTION)
    return rows_of_options({f"`{OPTION}`": named})


def _with_inputs_of_run(rows: Sequence[PromptRow], asked: Collection[str]) -> Iterator[PromptRow]:
    """Yield the prompts with the images that the run trains with; the first image of another input is reported."""
    other = {name: row.where for row in reversed(rows) for name in row.images if name not in asked}
    for name, where in other.items():
        hint = f"remove the column, or train with it: `--extra_inputs {name}`"
        report(Problem(f"{where}: the run trains without `{name}`", hint, wrong_use=True))
    for row in rows:
        yield replace(row, images={name: paths for name, paths in row.images.items() if name in asked})


def _is_file(named: str) -> bool:
    """Return whether a text names a file of prompts, which may be missing; any other text is a prompt."""
    path = Path(named)
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        return path.is_file()
    except OSError:  # longer than a file name can be
        return False


def _usual_size(samples: Sequence[Sample], variant: Variant) -> ImageSize:
    """Return the most frequent size of the samples, of equally frequent ones the largest; without samples, that which
    the model is documented for.
    """
    counts = Counter(sample.target.shape for sample in samples)
    if not counts:
        return ImageSize(variant.sampling.height, variant.sampling.width, variant.sampling.num_frames)
    frames, height, width = max(counts, key=lambda shape: (counts[shape], shape))
    return ImageSize(height, width, frames)


def _unused_negative_prompts(rows: Sequence[PromptRow], defaults: JobDefaults) -> Iterator[Problem]:
    if defaults.cfg_scale == 1:
        for row in rows:
            if row.negative_prompt:
                what = f"the negative prompt of {row.where} has no effect: {defaults.variant.title} is drawn without"
                yield Problem(f"{what} classifier-free guidance", "remove it", wrong_use=True)


def _way_out(name: str, required: bool) -> str:
    """Return the hint for a prompt without images of an extra input."""
    return f"add the column `{name}` to a table of prompts, or pass `{OPTION} {DATASET}`"

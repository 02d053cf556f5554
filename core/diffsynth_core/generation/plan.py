"""From a request to the plan of what is drawn, with all problems collected. Reads headers, no weights."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TypeVar

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.resolve import independent_problems, parameters_of_other_families
from diffsynth_core.errors import FaultsFound, Problem, collect_problems, list_names, report
from diffsynth_core.files import default_cache_path
from diffsynth_core.generation.checks import check_guidance, check_size
from diffsynth_core.generation.columns import Column, LoraReader, find_columns
from diffsynth_core.generation.generation_plan import GenerationPlan
from diffsynth_core.generation.model import find_model, with_checkpoint, with_inputs
from diffsynth_core.generation.request import (
    GenerationRequest,
    ModelSource,
    one_stage_problem,
    read_numbers,
)
from diffsynth_core.hub.file_requests import FileRequest
from diffsynth_core.hub.model_files import missing_in_one
from diffsynth_core.models.registry import image_inputs
from diffsynth_core.models.spec import Variant
from diffsynth_core.models.weight_store import find_store
from diffsynth_core.planning.drawing.dataset_prompts import prompts_of_dataset
from diffsynth_core.planning.drawing.jobs import AppliedLora, ImageSize, JobDefaults, SamplingChoice
from diffsynth_core.planning.drawing.prompt_images import ImageChecks
from diffsynth_core.planning.drawing.prompts import PromptRow, read_prompts, rows_of_options
from diffsynth_core.planning.machine.device import choose_device, choose_precision
from diffsynth_core.planning.model.model_plan import ModelPlan
from diffsynth_core.planning.model.required_files import files_of_stages
from diffsynth_core.planning.model.storage import storage_flag
from diffsynth_core.planning.output.folder import cache_faults, folder_faults
from diffsynth_core.planning.plan import Machine

T = TypeVar("T")
OUTPUTS = Path("generated")
"""Parent of the default output folders."""
SHEET = "grid.png"
"""File name of a grid."""
GIVE_PROMPTS = "pass `--prompt TEXT` or `--prompts FILE`"
"""Hint for a run without captions."""
TO_REHEARSE = ", or rehearse with `--rehearse`"
"""The last way out in hints about missing files of a training run, which drawing does not have."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """The labels of a grid: a row for each prompt."""

    path: Path
    rows: tuple[str, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PlannedImage:
    """Where an image or clip is written, and its place in a grid."""

    path: Path
    row: int
    column: int


@dataclass(frozen=True, kw_only=True)
class Generation:
    """All that a command draws.

    Attributes:
        plans: one for each model; several for a grid of full checkpoints.
        images: the output of each job, by plan.
        missing: missing files or device. Such a plan can be displayed but not carried out.
    """

    parameters: Parameters
    plans: tuple[GenerationPlan, ...]
    images: tuple[tuple[PlannedImage, ...], ...]
    out: Path
    sheet: Sheet | None = None
    missing: tuple[Problem, ...] = ()

    @property
    def count(self) -> int:
        """Number of images or clips."""
        return sum(map(len, self.images))


def plan_generation(
    source: ModelSource, request: GenerationRequest, base: Path, without_files: bool = False
) -> Generation:
    """Plan what a request draws.

    Args:
        base: folder of downloaded models.
        without_files: list missing model files and device in the plan instead of raising.

    Raises:
        FaultsFound: all problems together.
    """
    resolved = source.resolved
    with collect_problems(missing_apart=without_files) as problems:
        choice, rows, columns = read_numbers(request), _given_prompts(request), find_columns(request, source.record)
        parameters, models = _find_models(source, columns, _given_inputs(request, rows), base)
        found = next(iter(models.values()), None)
        if found and source.record and not _names_prompts(request):
            rows = prompts_of_dataset(parameters, found, request.images, GIVE_PROMPTS)
        defaults = _defaults(source, request, parameters, choice, found.variant) if found else None
        adapters = _adapters(columns, models)
        if found and defaults:
            _check(request, rows, defaults, parameters, found)
            report(*_varying_differences(adapters, found))
        device = choose_device(parameters)
        machine = Machine(device=device, mixed_precision=choose_precision(parameters, device))
        cache, out = parameters.cache_path or default_cache_path(), request.out or OUTPUTS / source.name
        report(*cache_faults(cache), *_out_faults(out))
    missing = tuple(_for_drawing(problems.missing)) if without_files else ()
    if resolved.problems or problems or not defaults:
        others = _for_drawing(independent_problems([*problems, *missing], resolved.invalid))
        raise FaultsFound([*resolved.problems, *others] or [Problem("nothing can be drawn")])
    plans, images = [], []
    for checkpoint, model in models.items():
        own = [number for number, column in enumerate(columns) if column.checkpoint == checkpoint]
        cells = [(row, column) for row in range(len(rows)) for column in own]
        jobs = tuple(defaults.job(rows[row], row, adapters[columns[column]]) for row, column in cells)
        plans.append(
            GenerationPlan(model=model, machine=machine, jobs=jobs, cache=cache, max_pixels=parameters.max_pixels)
        )
        suffix = ".mp4" if defaults.size.num_frames > 1 else ".png"
        names = [f"{row * len(columns) + column + 1:04}{suffix}" for row, column in cells]
        images.append(
            tuple(
                PlannedImage(path=out / name, row=row, column=column)
                for name, (row, column) in zip(names, cells, strict=True)
            )
        )
    return Generation(
        parameters=parameters,
        plans=tuple(plans),
        images=tuple(images),
        out=out,
        sheet=_sheet(out, rows, columns) if request.grid else None,
        missing=missing,
    )


def files_to_download(source: ModelSource, request: GenerationRequest, base: Path) -> list[FileRequest]:
    """Return the hub files that a request requires."""
    with collect_problems():  # which planning reports
        columns, inputs = find_columns(request, source.record), _given_inputs(request, _given_prompts(request))
        stages = [with_checkpoint(source.resolved, one.checkpoint, base)[0] for one in dict.fromkeys(columns)]
        stages += [source.second] if source.second else []
        return files_of_stages([with_inputs(resolved, inputs) for resolved in stages])


def _sheet(out: Path, rows: Sequence[PromptRow], columns: Sequence[Column]) -> Sheet:
    prompts, labels = tuple(row.prompt for row in rows), tuple(column.label for column in columns)
    return Sheet(path=out / SHEET, rows=prompts, columns=labels)


def _names_prompts(request: GenerationRequest) -> bool:
    return bool(request.prompts or request.prompts_file)


def _given_prompts(request: GenerationRequest) -> list[PromptRow]:
    """Return the prompts of the command line, then those of the file. Reports problems."""
    if not _names_prompts(request) and request.run is None:
        report(Problem("no prompt given", "pass `--prompt TEXT` or `--prompts FILE`", wrong_use=True))
    rows = rows_of_options({f"`--prompt` {number}": prompt for number, prompt in enumerate(request.prompts, 1)})
    return [*rows, *read_prompts(request.prompts_file, "--prompts")] if request.prompts_file else rows


def _given_inputs(request: GenerationRequest, rows: Sequence[PromptRow]) -> list[str]:
    """Return the extra inputs for which there are images."""
    return [name for name in image_inputs() if request.images.get(name) or any(row.images.get(name) for row in rows)]


def _find_models(
    source: ModelSource, columns: Sequence[Column], inputs: Sequence[str], base: Path
) -> tuple[Parameters, dict[Path | None, ModelPlan]]:
    """Return checkpoint -> model with it, for all columns, and the parameters with the defaults of the family."""
    resolved, models = source.resolved, {}
    for checkpoint in dict.fromkeys(column.checkpoint for column in columns):
        changed, found = find_model(*with_checkpoint(source.resolved, checkpoint, base), inputs, base)
        if found and source.second:
            found = _with_second(found, source, inputs, base)
        if found:
            models[checkpoint], resolved = found, changed
    first = next(iter(models.values()), None)
    if first and source.resolved.family is None:
        report(*parameters_of_other_families(resolved.parameters, first.facts.name, resolved.origins))
    return resolved.parameters, models


def _with_second(found: ModelPlan, source: ModelSource, inputs: Sequence[str], base: Path) -> ModelPlan:
    """Return a model of two denoisers with the second one, which is that of the second stage."""
    assert source.second
    first, second = found.facts.denoiser, found.facts.second_denoiser
    if not second or found.variant.sampling.boundary is None:
        report(one_stage_problem((source.resolved, source.second)))
        return found
    _, other = find_model(*with_checkpoint(source.second, None, base), inputs, base)
    if not other or first not in other.components:
        return found

    def added(known: Mapping[str, T], more: Mapping[str, T]) -> dict[str, T]:
        return {**known, **({second: more[first]} if first in more else {})}

    return replace(
        found,
        components=added(found.components, other.components),
        shapes=added(found.shapes, other.shapes),
        published=added(found.published, other.published),
        stored=added(found.stored, other.stored),
    )


def _defaults(
    source: ModelSource, request: GenerationRequest, parameters: Parameters, choice: SamplingChoice, variant: Variant
) -> JobDefaults:
    return JobDefaults(
        variant=variant,
        choice=choice,
        size=_choose_size(source, parameters, variant),
        negative_prompt=request.negative_prompt,
        seed=parameters.seed,
        images=request.images,
    )


def _choose_size(source: ModelSource, parameters: Parameters, variant: Variant) -> ImageSize:
    """Return the size on the command line, that at which a run trained, or the documented one of the model."""
    facts, own = variant.sampling, ("flag", "config") if source.record else ("flag",)
    height, width, num_frames = facts.height, facts.width, facts.num_frames
    if parameters.height and parameters.width and source.resolved.origin("height").kind in own:
        height, width = parameters.height, parameters.width
    elif source.record and parameters.max_pixels < height * width:
        scale, factor = math.sqrt(parameters.max_pixels / (height * width)), variant.target.size_factor
        height, width = (max(factor, int(side * scale) // factor * factor) for side in (height, width))
    if variant.target.kind == "video" and source.resolved.origin("num_frames").kind in own:
        num_frames = parameters.num_frames
    return ImageSize(height, width, num_frames)


def _adapters(
    columns: Sequence[Column], models: Mapping[Path | None, ModelPlan]
) -> dict[Column, tuple[AppliedLora, ...]]:
    readers = {checkpoint: LoraReader(model) for checkpoint, model in models.items()}
    return {column: readers[column.checkpoint].applied(column) for column in columns if column.checkpoint in readers}


def _check(
    request: GenerationRequest,
    rows: Sequence[PromptRow],
    defaults: JobDefaults,
    parameters: Parameters,
    found: ModelPlan,
) -> None:
    """Report what the model cannot draw."""
    check_size(defaults.size, found.variant)
    check_guidance(request, rows, defaults.cfg_scale, found.variant)
    needed = [name for name in parameters.extra_inputs if name in image_inputs()]
    ImageChecks(found.facts, found.variant, needed, parameters.max_pixels, _way_out).check(rows, request.images)


def _way_out(name: str, required: bool) -> str:
    """Return the hint for a prompt without images of an extra input."""
    return f"pass `--{name} FILE`" if required else f'pass `--{name} FILE`, or draw without it: `--extra_inputs ""`'


def _varying_differences(adapters: Mapping[Column, Sequence[AppliedLora]], found: ModelPlan) -> Iterator[Problem]:
    """Yield problems of full-weight differences, which are merged while loading: they cannot vary from image to image,
    and 8-bit floats would round them.
    """
    weights: dict[Path, list[float]] = {}
    for applied in (one for column in adapters.values() for one in column if one.lora.tensors):
        weights.setdefault(applied.lora.path, []).append(applied.weight)
        storage = found.components[applied.component].storage
        if storage != "plain":
            what = f"`{applied.lora.path}` has full-weight differences, which {find_store(storage).title} would round"
            yield Problem(what, f"remove the {applied.component} from `--{storage_flag(storage)}`", wrong_use=True)
    for path, found_weights in weights.items():
        if len(set(found_weights)) > 1 or len(found_weights) < len(adapters):
            what = f"`{path}` has full-weight differences, which are the same for all images of a command"
            yield Problem(what, "draw each weight with a command of its own", wrong_use=True)


def _for_drawing(problems: Iterable[Problem]) -> list[Problem]:
    """Return problems with missing files merged into one, and with hints that drawing can follow."""
    return [
        replace(one, hint=one.hint.removesuffix(TO_REHEARSE).replace(", set DIFFSYNTH", ", or set DIFFSYNTH"))
        if one.hint and one.hint.endswith(TO_REHEARSE)
        else one
        for one in missing_in_one(list(problems))
    ]


def _out_faults(out: Path) -> list[Problem]:
    """Return why images cannot be written to a folder: files in it would be mistaken for those of this command."""
    if faults := folder_faults(out, "out"):
        return faults
    held = sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) if out.is_dir() else []
    if not held:
        return []
    free = next(path for number in count(2) if not (path := out.with_name(f"{out.name}-{number}")).exists())
    return [Problem(f"`{out}` holds files: {list_names(held)}", f"choose another folder: `--out {free}`")]

"""What a `generate` command asks for, and the parameters of the model that it draws with. No torch."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffsynth_core.checkpoints.run_folder import RECORD, RunRecord, read_record
from diffsynth_core.config.choices import MAX_SAMPLING_STEPS
from diffsynth_core.config.parameters import DEFAULTS, SETTINGS
from diffsynth_core.config.quant_options import rename_entries
from diffsynth_core.config.resolve import Resolved, resolve_recorded, resolve_stages
from diffsynth_core.errors import DiffSynthError, Problem, collect_problems, report
from diffsynth_core.planning.drawing.jobs import SamplingChoice

MODEL_SOURCES = ("recipe", "config", "only")
"""Parameters that `--run` replaces."""
ABOUT_THE_RUN = (*MODEL_SOURCES, "task", "resume", "rehearse", "dry_run", "verbose", "seed", "device", "gpu_memory")
"""Parameters of a run that are not those of what its model draws."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """The options of a `generate` command that are no parameters of training; values are checked by the plan.

    Attributes:
        negative_prompt, steps, cfg_scale, guidance: None: the documented default of the model.
        images: extra input -> its files, for all prompts.
        loras: each `FILE`, `FILE:WEIGHT` or, for a grid, `FILE:WEIGHT,WEIGHT,…`.
        second_loras: those of the second of two denoisers.
        checkpoint: full weights of one component, in place of the files of the recipe or run.
        run: folder of a run whose model, last checkpoint and captions are used.
        out: output folder; None: `generated/` and the name of the recipe or run.
        grid: draw a sheet of prompts x weights, or x the checkpoints of the run.
    """

    prompts: tuple[str, ...] = ()
    prompts_file: Path | None = None
    negative_prompt: str | None = None
    steps: int | str | None = None
    cfg_scale: float | str | None = None
    guidance: float | str | None = None
    images: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    loras: tuple[str, ...] = ()
    second_loras: tuple[str, ...] = ()
    checkpoint: Path | None = None
    run: Path | None = None
    out: Path | None = None
    grid: bool = False


def read_numbers(request: GenerationRequest) -> SamplingChoice:
    """Return the numbers of a request. Reports problems; a wrong number is None."""
    steps = _number("steps", request.steps, 1, "an integer")
    if steps is not None and (steps != int(steps) or steps > MAX_SAMPLING_STEPS):
        expected = f"an integer of at most {MAX_SAMPLING_STEPS}" if steps > MAX_SAMPLING_STEPS else "an integer"
        report(_wrong("steps", request.steps, expected))
        steps = None
    cfg_scale = _number("cfg_scale", request.cfg_scale, 1, "a number")
    guidance = _number("guidance", request.guidance, 0, "a number")
    return SamplingChoice(None if steps is None else int(steps), cfg_scale, guidance)


def _number(name: str, value: float | str | None, least: int, expected: str) -> float | None:
    """Return a number of at least `least`; None if it is none, which is reported, or not given."""
    if value is None:
        return None
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        report(_wrong(name, value, expected))
        return None
    if number < least:
        off = "; 1 turns classifier-free guidance off" if name == "cfg_scale" else ""
        report(_wrong(name, value, f"{expected} of at least {least}{off}"))
        return None
    return number


def _wrong(name: str, value: object, expected: str) -> Problem:
    return Problem(f"`{name}` takes {expected}, got `{value}` (`--{name}`)", wrong_use=True)


@dataclass(frozen=True)
class ModelSource:
    """Whose model draws.

    Attributes:
        name: of the recipe, configuration file or run, for the output folder.
        record: that of the run, if one is named.
        second: parameters of the second of two stages, whose model may be the second of two denoisers.
    """

    resolved: Resolved
    name: str
    record: RunRecord | None = None
    second: Resolved | None = None


def find_source(request: GenerationRequest, flags: Mapping[str, Any], unknown: Sequence[str] = ()) -> ModelSource:
    """Return the parameters of the model, from flags, configuration file and recipe, or from the record of a run.

    Problems are in the result, as for `resolve_stages`.

    Args:
        flags: values of parameters on the command line, by name.
        unknown: words that no option consumed.

    Raises:
        DiffSynthError: if the folder in `run` is not that of a run.
    """
    with collect_problems() as problems:
        flags = _check_sides(flags)
        if request.run is not None:
            for name in (name for name in MODEL_SOURCES if name in flags):
                what = f"`--run` takes model and parameters from `{request.run / RECORD}`, and `--{name}` is given too"
                report(Problem(what, "remove one of them", wrong_use=True))
    if request.run is None:
        resolved, second = _stages(resolve_stages(flags, unknown))
        parameters = resolved.parameters
        name = parameters.recipe or (parameters.config.stem if parameters.config else "") or resolved.family or "images"
        return ModelSource(_with(resolved, problems), name, second=second)
    record = _read_run(request.run)
    kept = {name: value for name, value in flags.items() if name not in MODEL_SOURCES}
    resolved = resolve_recorded(_of_model(record), record.family, f"`{request.run / RECORD}`", kept, unknown)
    return ModelSource(_with(resolved, problems), request.run.resolve().name, record)


def _of_model(record: RunRecord) -> dict[str, Any]:
    """Return the recorded parameters that are set, as far as the model and its files depend on them.

    The record lists all parameters; those at their default count as not set, as they most likely were.
    """
    return {
        name: value
        for name, value in record.parameters.items()
        if (setting := SETTINGS.get(name)) and value != DEFAULTS[name] and setting.name not in ABOUT_THE_RUN
    }


def _with(resolved: Resolved, problems: Sequence[Problem]) -> Resolved:
    return replace(resolved, problems=(*problems, *resolved.problems))


def _check_sides(flags: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the flags without a height or width that is given alone, which is reported."""
    sides = [name for name in ("height", "width") if name in flags]
    if len(sides) != 1:
        return flags
    other = "width" if sides == ["height"] else "height"
    what = f"`{sides[0]}` is set without `{other}`"
    report(Problem(what, f"set `--{other}` too, or neither for the size of the model", wrong_use=True))
    return {name: value for name, value in flags.items() if name != sides[0]}


def _stages(stages: Sequence[Resolved]) -> tuple[Resolved, Resolved | None]:
    """Return the parameters of the first stage, and of the second of two; more than two cannot draw one image."""
    if len(stages) > 2:
        problem = one_stage_problem(stages)
        return replace(stages[0], problems=(*stages[0].problems, problem)), None
    if len(stages) == 1:
        return stages[0], None
    first, second = stages
    return _without_entries_of(second, first), _without_entries_of(first, second)


def _without_entries_of(other: Resolved, resolved: Resolved) -> Resolved:
    """Return the parameters of a stage without the models in `fp8_models` and `quant_options` that only the other stage
    has: a flag is for both.
    """
    own, others = (
        {*one.parameters.model_id_with_origin_paths, *(path for group in one.parameters.model_paths for path in group)}
        for one in (resolved, other)
    )

    def kept(entries: Iterable[str]) -> tuple[str, ...]:
        return tuple(entry for entry in entries if entry in own or entry not in others)

    quantized = rename_entries(resolved.parameters.quant_options, lambda entry: kept((entry,)))
    update = {"fp8_models": kept(resolved.parameters.fp8_models), "quant_options": quantized}
    return replace(resolved, parameters=resolved.parameters.model_copy(update=update))


def one_stage_problem(stages: Sequence[Resolved]) -> Problem:
    """Return the problem of stages that do not have the two denoisers of one model."""
    listed = ", ".join(str(resolved.stage) for resolved in stages)
    what = f"there are the stages {listed}, and each has a model of its own"
    return Problem(what, "choose one with `--only`", wrong_use=True)


def _read_run(folder: Path) -> RunRecord:
    """Return the record of a run.

    Raises:
        DiffSynthError: if there is none, or it is damaged.
    """
    hint = f"pass the folder of a run, which holds `{RECORD}`"
    try:
        record = read_record(folder)
    except DiffSynthError as error:
        raise DiffSynthError(error.problems[0].message, hint) from error
    if record is None:
        what = "is not the folder of a run" if folder.exists() else "does not exist"
        raise DiffSynthError(f"`--run` `{folder}` {what}", hint)
    return record

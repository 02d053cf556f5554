"""From flags, a config file, a recipe and defaults to the parameters of each stage, with all problems at once."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from diffsynth_core.config.arguments import StrayWord, unknown_arguments
from diffsynth_core.config.gpu_memory import nearest_memory
from diffsynth_core.config.parameters import SETTINGS, Parameters
from diffsynth_core.config.recipes import Overrides, Recipe, load_config, load_recipe
from diffsynth_core.config.tasks import TASKS
from diffsynth_core.errors import DiffSynthError, Problem, suggest

COMMAND_LINE = "command line"
ALIGN, LORA_FORMAT, ALIGNED_FORMAT = "align_to_opensource_format", "lora_format", "kohya"
"""A documented switch that is another spelling of one value of a setting."""
ConfigSource = tuple[str, Overrides]
"""Where values come from, as a report names it, and the values."""


@dataclass(frozen=True)
class Resolved:
    """Parameters of one run, what was wrong with them, and where each value came from.

    `stage` is None where there are no stages. Values that were wrong are left at the default and named in `invalid`,
    so that the checks behind can go on. `family_defaults` names the values that are a default of the family alone.
    `levels`: how near to the user each value was given; a flag is the nearest.
    """

    parameters: Parameters
    family: str | None
    problems: tuple[Problem, ...]
    invalid: frozenset[str]
    incomplete: bool
    origins: Mapping[str, str] = field(default_factory=dict)
    stage: str | None = None
    family_defaults: tuple[str, ...] = ()
    levels: Mapping[str, int] = field(default_factory=dict)

    def given(self, name: str) -> bool:
        """Whether a flag, a file or a recipe set the parameter."""
        return name in self.origins

    def with_defaults_of(self, family: str) -> "Resolved":
        """The same with the defaults of a family where nothing else is given."""
        changed = {
            name: setting.default_of(family)
            for name, setting in SETTINGS.items()
            if family in setting.family_defaults and name not in self.origins
        }
        parameters = self.parameters.model_copy(update=changed)
        return replace(self, parameters=parameters, family_defaults=tuple(changed))

    def takes_precedence(self, name: str, other: str) -> bool:
        """Whether one parameter was given nearer to the user than another, as a flag is to one beside a recipe."""
        return self.levels.get(name, -1) > self.levels.get(other, -1)


def resolve(flags: Mapping[str, Any], unknown: Sequence[str] = ()) -> Resolved:
    """Put the parameters of a single run together, as `resolve_stages` does.

    Raises:
        ValueError: when there are several stages to run.
    """
    (resolved,) = resolve_stages(flags, unknown)
    return resolved


def resolve_stages(flags: Mapping[str, Any], unknown: Sequence[str] = ()) -> tuple[Resolved, ...]:
    """Put the parameters of each stage together: flags > `--config` file > recipe > default.

    Within a file the values of the stage go over those for all stages, and both over those of the recipe it extends.
    Without stages there is one entry. Problems that concern all stages stand in every entry.

    `flags` holds the values given on the command line by name, `unknown` the words that no option took, in their order.
    """
    problems = unknown_arguments(unknown)
    slipped = frozenset(name for name, value in flags.items() if _slipped(name, value, problems))
    flags = {name: value for name, value in flags.items() if name not in slipped}
    config = _load_quietly(load_config, flags.get("config"), problems)
    recipe = _load_quietly(load_recipe, flags.get("recipe"), problems)
    incomplete = any(flags.get(name) and not loaded for name, loaded in (("config", config), ("recipe", recipe)))
    incomplete = incomplete or not slipped.isdisjoint({"config", "recipe"})
    if not (config or recipe):  # with a stray word that was to be one, what else is missing is no fault of its own
        incomplete = incomplete or any(isinstance(problem, StrayWord) for problem in problems)
    sources: list[ConfigSource] = []
    stages: list[str] = []
    for loaded, origin in ((recipe, f"recipe `{flags.get('recipe')}`"), (config, f"`{flags.get('config')}`")):
        if loaded:
            sources += [(origin, layer) for layer in loaded.layers]
            stages += [name for name in loaded.stages if name not in stages]
    sources.append((COMMAND_LINE, Overrides(flags)))
    chosen = _choose_stages(flags.get("only"), stages, incomplete, problems)
    problems += [] if flags.get("only") else _conflicts(sources, chosen)
    named = flags.get("recipe") or (config.name if config else None)
    family = (config.family if config else None) or (recipe.family if recipe else None)
    found = tuple(
        _resolve_one(sources, stage, named, family, tuple(problems), incomplete, slipped) for stage in chosen or (None,)
    )
    return _told_shared_folders(found)


def _resolve_one(
    sources: Sequence[ConfigSource],
    stage: str | None,
    named: str | None,
    family: str | None,
    problems: tuple[Problem, ...],
    incomplete: bool,
    slipped: AbstractSet[str],
) -> Resolved:
    """The parameters of one stage, or of a run without stages; `slipped` names flags without a value, told already."""
    values, origins = _merge(sources, stage)
    if named and "output_path" not in values:
        values["output_path"] = f"models/train/{named}"
    misspelt = _settle_lora_format(_levels(sources, stage), values, origins)
    parameters, invalid, faults = _validate(values, origins)
    invalid |= slipped
    faults += misspelt
    if stage:
        # A folder that the stage names itself is its own; any other is the one above those of all stages.
        of_stage = origins.get("output_path", "").endswith(_of_stage(stage))
        folder = parameters.output_path if of_stage else parameters.output_path / stage
        parameters = parameters.model_copy(update={"only": stage, "output_path": folder})
    consequences = _cross_problems(parameters, invalid)
    consequences += parameters_of_other_families(parameters, family, origins) if family else []
    faults += independent_problems(consequences, invalid)
    levels = {name: place for place, (_, level) in enumerate(_levels(sources, stage)) for name in level}
    resolved = Resolved(
        parameters, family, (*problems, *faults), frozenset(invalid), incomplete, origins, stage, levels=levels
    )
    return resolved.with_defaults_of(family) if family else resolved


def _levels(sources: Sequence[ConfigSource], stage: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Sources of values, those that take precedence last: the name of the source as a report has it, and its values."""
    for origin, layer in sources:
        yield origin, layer.parameters
        yield f"{origin}{_of_stage(stage)}", layer.stages.get(stage or "", {})


def _merge(sources: Sequence[ConfigSource], stage: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of all sources, later ones over earlier ones, and the origin of each."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, level in _levels(sources, stage):
        for name, value in level.items():
            values[name] = value
            origins[name] = f"`--{name}`" if origin == COMMAND_LINE else origin
    return values, origins


def _settle_lora_format(
    levels: Iterable[tuple[str, Mapping[str, Any]]], values: dict[str, Any], origins: dict[str, str]
) -> list[Problem]:
    """Make one of the two spellings of the LoRA's format: the nearer goes; in one place they must agree."""
    problems = []
    aligned = False
    for origin, level in levels:
        if ALIGN not in level and LORA_FORMAT not in level:
            continue
        aligned = _read(ALIGN, level.get(ALIGN)) is True
        other = level.get(LORA_FORMAT, ALIGNED_FORMAT)
        if aligned and other != ALIGNED_FORMAT:
            aligned = False
            if other in SETTINGS[LORA_FORMAT].choices:  # what is none is told as any wrong value
                what = f"`{ALIGN}` implies `{LORA_FORMAT}` `{ALIGNED_FORMAT}`, but `{LORA_FORMAT}` is `{other}`"
                problems.append(Problem(f"{what} ({origin})", "remove one of them", wrong_use=True))
    if aligned:
        values[LORA_FORMAT], origins[LORA_FORMAT] = ALIGNED_FORMAT, origins[ALIGN]
    elif ALIGN in values and _read(ALIGN, values[ALIGN]) is True:
        values[ALIGN] = False
    return problems


def _of_stage(stage: str | None) -> str:
    """What an origin says of a value that belongs to one stage."""
    return f", stage `{stage}`"


def _choose_stages(only: str | None, stages: list[str], incomplete: bool, problems: list[Problem]) -> list[str]:
    """The stages to run; all of them when the one asked for is unknown."""
    if only is None or only in stages:
        return [only] if only else stages
    if stages:
        near = suggest(only, stages)
        hint = f"did you mean `{near}`?" if near else f"the stages are {', '.join(stages)}"
        problems.append(Problem(f"there is no stage `{only}` (`--only`)", hint, wrong_use=True))
    elif not incomplete:
        what = f"`only` selects the stage `{only}`, but there are no stages"
        problems.append(Problem(what, "remove it, or use a recipe with stages", wrong_use=True))
    return stages


def _conflicts(sources: Sequence[ConfigSource], stages: Sequence[str]) -> list[Problem]:
    """Values for all stages that would go over what sources before them set differently by stage.

    `output_path` is the folder above those of the stages, whatever they say.
    """
    found: dict[str, Problem] = {}
    for place, (origin, layer) in enumerate(sources):
        below = {stage: _merge(sources[:place], stage)[0] for stage in stages}
        for name in layer.parameters:
            before = [_read(name, values.get(name, SETTINGS[name].default)) for values in below.values()]
            same = all(value == before[0] for value in before)
            if same or name == "output_path" or all(name in layer.stages.get(stage, {}) for stage in stages):
                continue
            listed = f"{', '.join(stages[:-1])} and {stages[-1]}"
            shown = f"`--{name}`" if origin == COMMAND_LINE else origin
            found[name] = Problem(
                f"`{name}` differs between the stages {listed} ({shown})",
                "select one of them with `--only`",
                wrong_use=True,
            )
    return list(found.values())


def _read(name: str, value: Any) -> Any:
    """A value as the declaration reads it; one that is wrong stays as it is."""
    try:
        return getattr(Parameters.model_validate({name: value}), name)
    except ValidationError:
        return value


def _told_shared_folders(stages: tuple[Resolved, ...]) -> tuple[Resolved, ...]:
    """Add the problem that two stages would write to one folder."""
    folders = [resolved.parameters.output_path.absolute() for resolved in stages]
    shared = [resolved for resolved, folder in zip(stages, folders, strict=True) if folders.count(folder) > 1]
    if not shared:
        return stages
    names = " and ".join(str(resolved.stage) for resolved in shared)
    what = f"the stages {names} share the folder `{shared[0].parameters.output_path}` (`output_path`)"
    problem = Problem(what, "remove `output_path` from the stages", wrong_use=True)
    return tuple(replace(resolved, problems=(*resolved.problems, problem)) for resolved in stages)


def _slipped(name: str, value: Any, problems: list[Problem]) -> bool:
    """Whether a flag's value is empty, or is the next flag."""
    setting = SETTINGS[name]
    flag = isinstance(value, str) and value.startswith("--")
    if not flag and not (value == "" and (setting.type_name == "path" or name in ("recipe", "only"))):
        return False
    hint = f"pass the value: `--{name} VALUE`"
    problems.append(Problem(f"`{name}` takes {setting.type_words}, got `{value}` (`--{name}`)", hint, wrong_use=True))
    return True


def _load_quietly(load: Any, name: Any, problems: list[Problem]) -> Recipe | None:
    """Load a recipe or collect what is wrong with it."""
    if not name:
        return None
    try:
        loaded: Recipe = load(name)
    except DiffSynthError as error:
        problems += error.problems
        return None
    problems += loaded.problems
    return loaded


def _validate(values: dict[str, Any], origins: Mapping[str, str]) -> tuple[Parameters, set[str], list[Problem]]:
    """Parameters from `values`; wrong ones fall back to the default and are told."""
    try:
        return Parameters.model_validate(values), set(), []
    except ValidationError as error:
        invalid: set[str] = set()
        problems = []
        for detail in error.errors():
            name = str(detail["loc"][0])
            if name in invalid:
                continue
            invalid.add(name)
            problems.append(_value_problem(name, values.get(name), detail, origins.get(name, "default")))
        kept = {name: value for name, value in values.items() if name not in invalid}
        return Parameters.model_validate(kept), invalid, problems


_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "less_than_equal": ("at most", "le"),
    "greater_than": ("more than", "gt"),
}


def _is_nan(value: Any) -> bool:
    """Whether a value is no number, which is within no bounds."""
    try:
        return math.isnan(float(value))
    except (TypeError, ValueError):
        return False


def _value_problem(name: str, value: Any, detail: Any, origin: str) -> Problem:
    expected = SETTINGS[name].type_words
    if detail["type"] in _BOUNDS and not _is_nan(value):
        words, key = _BOUNDS[detail["type"]]
        expected = f"{expected} of {words} {detail['ctx'][key]}"
    shown = value if isinstance(value, str) else json.dumps(value, default=str)
    memory = SETTINGS[name].type_name == "memory"
    near = nearest_memory(shown) if memory else suggest(shown, SETTINGS[name].choices)
    hint = f"did you mean `{near}`?" if near else None
    return Problem(f"`{name}` takes {expected}, got `{shown}` ({origin})", hint, wrong_use=True)


def independent_problems(problems: Iterable[Problem], invalid: AbstractSet[str]) -> list[Problem]:
    """Of problems that checks found, those that do not concern a parameter whose value was wrong.

    Such a parameter is at its default for the checks, of which nobody knows whether it is what was meant. What a
    problem concerns is what its message and its hint name, as `lora_rank` or `--lora_rank`.
    """
    return (
        [problem for problem in problems if invalid.isdisjoint(_parameters_named(problem))] if invalid else [*problems]
    )


def _parameters_named(problem: Problem) -> set[str]:
    """The parameters that a problem is about or has to do with."""
    words = re.findall(r"`(?:--(?:no-)?)?(\w+)\b", f"{problem.message} {problem.hint or ''}")
    return set(words) & SETTINGS.keys()


def _cross_problems(parameters: Parameters, invalid: set[str]) -> list[Problem]:
    """Combinations that cannot work, whatever the family."""
    problems = []
    if (parameters.height is None) != (parameters.width is None) and not invalid & {"height", "width"}:
        given, missing = ("height", "width") if parameters.width is None else ("width", "height")
        problems.append(
            Problem(
                f"`{given}` is set without `{missing}`",
                f"set `--{missing}` too, or neither for dynamic resolution",
                wrong_use=True,
            )
        )
    if int(parameters.min_timestep_boundary * 1000) >= int(parameters.max_timestep_boundary * 1000):
        problems.append(
            Problem(
                f"`min_timestep_boundary` {parameters.min_timestep_boundary} is not below `max_timestep_boundary` {parameters.max_timestep_boundary}",
                "choose a lower `--min_timestep_boundary` or a higher `--max_timestep_boundary`",
                wrong_use=True,
            )
        )
    task = TASKS[parameters.task]
    if parameters.rehearse and not (task.encodes and task.trains):
        problems.append(
            Problem(
                f"`rehearse` rehearses a complete run, but `task` `{task.name}` is one of two stages",
                f"rehearse with `--task {task.objective}`",
                wrong_use=True,
            )
        )
    if task.objective != "sft":
        problems += [
            Problem(
                f"`{name}` has no effect with `{task.name}`, where the samples determine the timesteps",
                "remove it",
                wrong_use=True,
            )
            for name in ("min_timestep_boundary", "max_timestep_boundary")
            if getattr(parameters, name) != SETTINGS[name].default
        ]
    if parameters.resume and parameters.rehearse:
        problems.append(
            Problem("`rehearse` starts a new run and cannot `resume` one", "remove one of them", wrong_use=True)
        )
    return problems


def parameters_of_other_families(parameters: Parameters, family: str, origins: Mapping[str, str]) -> list[Problem]:
    """Settings that were given and that mean nothing to this family."""
    return [
        Problem(
            f"`{name}` does not apply to {family}, only to {', '.join(setting.families)} ({origins[name]})",
            "remove it",
            wrong_use=True,
        )
        for name, setting in SETTINGS.items()
        if name in origins and getattr(parameters, name) != setting.default
        if setting.families and family not in setting.families
    ]

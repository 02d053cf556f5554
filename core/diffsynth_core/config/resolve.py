"""From flags, a config file, a recipe and defaults to the parameters of each stage, with all problems collected."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from diffsynth_core.config.arguments import StrayWord, unknown_arguments
from diffsynth_core.config.choices import TRAINING_TIMESTEPS
from diffsynth_core.config.durations import nearest_durations
from diffsynth_core.config.gpu_memory import nearest_memory
from diffsynth_core.config.origins import DEFAULT, Kind, Origin, Source, Stated, levels_of, merge, rank_sources
from diffsynth_core.config.parameters import SETTINGS, Parameters
from diffsynth_core.config.recipes import Overrides, Recipe, load_config, load_recipe
from diffsynth_core.config.tasks import TASKS
from diffsynth_core.errors import DiffSynthError, Problem, collect_problems, report, suggest

ALIGN, LORA_FORMAT, ALIGNED_FORMAT = "align_to_opensource_format", "lora_format", "kohya"
"""`align_to_opensource_format`, a switch of DiffSynth-Studio, is equivalent to `lora_format` = `kohya`."""


@dataclass(frozen=True)
class Resolved:
    """Parameters of one run, their problems, and the origin of each value.

    Attributes:
        invalid: names of parameters with a wrong value, which are at their default so that later checks can continue.
        incomplete: a recipe or config file is missing, so that more values may be missing too.
        origins: name -> where the value comes from, for parameters that are set.
        stage: None if there are no stages.
        family_defaults: names of parameters that are at a default of this family only.
        warnings: values that others take precedence over, where that may surprise.
    """

    parameters: Parameters
    family: str | None
    problems: tuple[Problem, ...]
    invalid: frozenset[str]
    incomplete: bool
    origins: Mapping[str, Origin] = field(default_factory=dict)
    stage: str | None = None
    family_defaults: tuple[str, ...] = ()
    warnings: tuple[Problem, ...] = ()

    def origin(self, name: str) -> Origin:
        """Return where the value of a parameter comes from."""
        return self.origins.get(name, DEFAULT)

    def with_defaults_of(self, family: str) -> "Resolved":
        """Return a copy with the defaults of a family for all parameters that are not set."""
        changed = {
            name: setting.default_of(family)
            for name, setting in SETTINGS.items()
            if family in setting.family_defaults and not self.origin(name).is_given
        }
        parameters = self.parameters.model_copy(update=changed)
        return replace(self, parameters=parameters, family_defaults=tuple(changed))

    def with_values(self, values: Mapping[str, Any], origin: Origin) -> "Resolved":
        """Return a copy with other values, in plain form, of some parameters."""
        read = Parameters.model_validate(dict(values))
        parameters = self.parameters.model_copy(update={name: getattr(read, name) for name in values})
        return replace(self, parameters=parameters, origins={**self.origins, **dict.fromkeys(values, origin)})

    def with_problem(self, problem: Problem) -> "Resolved":
        """Return a copy with one more problem."""
        return replace(self, problems=(*self.problems, problem))

    def takes_precedence(self, name: str, other: str) -> bool:
        """Return whether `name` was set in a source that takes precedence over the source of `other`."""
        return self.origin(name).rank > self.origin(other).rank


def resolve(flags: Mapping[str, Any], unknown: Sequence[str] = ()) -> Resolved:
    """Resolve the parameters of a run without stages, or of a single stage; see `resolve_stages`.

    Raises:
        ValueError: if there are several stages to run.
    """
    (resolved,) = resolve_stages(flags, unknown)
    return resolved


def resolve_stages(flags: Mapping[str, Any], unknown: Sequence[str] = ()) -> tuple[Resolved, ...]:
    """Resolve the parameters of each stage: flags > `--config` file > recipe > default.

    Within a file, values of a stage override those for all stages, and both override those of the extended recipe.
    Without stages the result has one entry. Problems that concern all stages are in every entry.

    Args:
        flags: values given on the command line, by name.
        unknown: words that no option consumed, in order.
    """
    with collect_problems() as problems:
        report(*unknown_arguments(unknown))
        valueless = frozenset(name for name, value in flags.items() if _has_no_value(name, value))
        flags = {name: value for name, value in flags.items() if name not in valueless}
        config = _load_quietly(load_config, flags.get("config"))
        recipe = _load_quietly(load_recipe, flags.get("recipe"))
        incomplete = any(flags.get(name) and not loaded for name, loaded in (("config", config), ("recipe", recipe)))
        incomplete = incomplete or not valueless.isdisjoint({"config", "recipe"})
        if not (config or recipe):  # a stray word may be the recipe: do not report what else is missing
            incomplete = incomplete or any(isinstance(problem, StrayWord) for problem in problems)
        layers: list[tuple[Kind, str, Overrides]] = []
        stages: list[str] = []
        files: tuple[tuple[Kind, str, Recipe | None], ...] = (
            ("recipe", f"recipe `{flags.get('recipe')}`", recipe),
            ("config", f"`{flags.get('config')}`", config),
        )
        for kind, source, loaded in files:
            if loaded:
                layers += [(kind, source, layer) for layer in loaded.layers]
                stages += [name for name in loaded.stages if name not in stages]
        sources = rank_sources([*layers, ("flag", "command line", Overrides(flags))])
        chosen = _choose_stages(flags.get("only"), stages, incomplete)
        report(*([] if flags.get("only") else _conflicts(sources, chosen)))
    named = flags.get("recipe") or (config.name if config else None)
    family = (config.family if config else None) or (recipe.family if recipe else None)
    found = tuple(
        _resolve_one(sources, stage, named, family, tuple(problems), incomplete, valueless)
        for stage in chosen or (None,)
    )
    return _check_shared_folders(found)


def resolve_recorded(
    recorded: Mapping[str, Any],
    family: str,
    source: str,
    flags: Mapping[str, Any],
    unknown: Sequence[str] = (),
) -> Resolved:
    """Resolve the parameters of a recorded run: flags > record > default.

    Args:
        recorded: all parameters of the run, by name.
        source: the record, for messages.
        flags, unknown: as for `resolve_stages`.
    """
    with collect_problems() as problems:
        report(*unknown_arguments(unknown))
        valueless = frozenset(name for name, value in flags.items() if _has_no_value(name, value))
        given = Overrides({name: value for name, value in flags.items() if name not in valueless})
        sources = rank_sources([("config", source, Overrides(dict(recorded))), ("flag", "command line", given)])
    return _resolve_one(sources, None, None, family, tuple(problems), False, valueless)


def with_values_of_launcher(resolved: Resolved, stated: Sequence[Stated]) -> Resolved:
    """Return the parameters with values that a launcher states: they take precedence over those of a recipe, while
    flags and the `--config` file take precedence over them, with a warning that names both.
    """
    origins = {name: Origin("launcher", source) for name, _, source in stated}
    read, wrong, problems = _validate({name: value for name, value, _ in stated}, origins)
    taken: dict[str, Any] = {}
    warnings = []
    for name, written, source in stated:
        value, own, by = getattr(read, name), getattr(resolved.parameters, name), resolved.origin(name)
        if name in wrong | resolved.invalid:
            continue
        if by.kind not in ("flag", "config"):
            taken[name] = value
        elif value != own:
            what = f"`{name}` is `{own}` ({by}), which takes precedence over `{written}` ({source})"
            warnings.append(Problem(what, "remove one of them"))
    return replace(
        resolved,
        parameters=resolved.parameters.model_copy(update=taken),
        problems=(*resolved.problems, *problems),
        invalid=resolved.invalid | wrong,
        origins={**resolved.origins, **{name: origins[name] for name in taken}},
        warnings=(*resolved.warnings, *warnings),
    )


def _resolve_one(
    sources: Sequence[Source],
    stage: str | None,
    named: str | None,
    family: str | None,
    problems: tuple[Problem, ...],
    incomplete: bool,
    valueless: AbstractSet[str],
) -> Resolved:
    """Resolve one stage, or a run without stages; `valueless` names flags without a value, reported already."""
    values, origins = merge(sources, stage)
    if named and "output_path" not in values:
        values["output_path"] = f"models/train/{named}"
    misspelled = _settle_lora_format(levels_of(sources, stage), values, origins)
    parameters, invalid, faults = _validate(values, origins)
    invalid |= valueless
    faults += misspelled
    if stage:
        # A folder set in the stage itself is used as is; any other is the parent of the folders of all stages.
        of_stage = origins.get("output_path", DEFAULT).stage == stage
        folder = parameters.output_path if of_stage else parameters.output_path / stage
        mirror = parameters.mirror and f"{parameters.mirror.rstrip('/')}/{stage}"
        repository = parameters.push_to_hub and f"{parameters.push_to_hub}-{stage}"
        of_stage_alone = {"only": stage, "output_path": folder, "mirror": mirror, "push_to_hub": repository}
        parameters = parameters.model_copy(update=of_stage_alone)
    consequences = _cross_problems(parameters, invalid)
    consequences += parameters_of_other_families(parameters, family, origins) if family else []
    faults += independent_problems(consequences, invalid)
    resolved = Resolved(parameters, family, (*problems, *faults), frozenset(invalid), incomplete, origins, stage)
    return resolved.with_defaults_of(family) if family else resolved


def _settle_lora_format(
    levels: Iterable[tuple[Origin, Mapping[str, Any]]], values: dict[str, Any], origins: dict[str, Origin]
) -> list[Problem]:
    """Reconcile the two spellings of the LoRA format: the source with the highest precedence wins; in one source both
    must agree.
    """
    problems = []
    aligned = False
    for origin, level in levels:
        if ALIGN not in level and LORA_FORMAT not in level:
            continue
        aligned = _read(ALIGN, level.get(ALIGN)) is True
        other = level.get(LORA_FORMAT, ALIGNED_FORMAT)
        if aligned and other != ALIGNED_FORMAT:
            aligned = False
            if other in SETTINGS[LORA_FORMAT].choices:  # any other value is reported as wrong by validation
                what = f"`{ALIGN}` implies `{LORA_FORMAT}` `{ALIGNED_FORMAT}`, but `{LORA_FORMAT}` is `{other}`"
                problems.append(Problem(f"{what} ({origin})", "remove one of them", wrong_use=True))
    if aligned:
        values[LORA_FORMAT], origins[LORA_FORMAT] = ALIGNED_FORMAT, origins[ALIGN]
    elif ALIGN in values and _read(ALIGN, values[ALIGN]) is True:
        values[ALIGN] = False
    return problems


def _choose_stages(only: str | None, stages: list[str], incomplete: bool) -> list[str]:
    """Return the stages to run; all of them if the requested one is unknown."""
    if only is None or only in stages:
        return [only] if only else stages
    if stages:
        near = suggest(only, stages)
        hint = f"did you mean `{near}`?" if near else f"the stages are {', '.join(stages)}"
        report(Problem(f"there is no stage `{only}` (`--only`)", hint, wrong_use=True))
    elif not incomplete:
        what = f"`only` selects the stage `{only}`, but there are no stages"
        report(Problem(what, "remove it, or use a recipe with stages", wrong_use=True))
    return stages


def _conflicts(sources: Sequence[Source], stages: Sequence[str]) -> list[Problem]:
    """Return the values for all stages that would override what sources of lower precedence set differently per stage.

    `output_path` is exempt: it is the parent folder of the stages.
    """
    found: dict[str, Problem] = {}
    for number, source in enumerate(sources):
        below = {stage: merge(sources[:number], stage)[0] for stage in stages}
        for name in source.values.parameters:
            before = [_read(name, values.get(name, SETTINGS[name].default)) for values in below.values()]
            same = all(value == before[0] for value in before)
            if same or name == "output_path" or all(name in source.values.stages.get(stage, {}) for stage in stages):
                continue
            listed = f"{', '.join(stages[:-1])} and {stages[-1]}"
            shown = f"`--{name}`" if source.origin.kind == "flag" else source.origin
            found[name] = Problem(
                f"`{name}` differs between the stages {listed} ({shown})",
                "select one of them with `--only`",
                wrong_use=True,
            )
    return list(found.values())


def _read(name: str, value: Any) -> Any:
    """Return a value as the declaration converts it; an invalid one unchanged."""
    try:
        return getattr(Parameters.model_validate({name: value}), name)
    except ValidationError:
        return value


def _check_shared_folders(stages: tuple[Resolved, ...]) -> tuple[Resolved, ...]:
    """Return the stages, with a problem added to each if two of them would write to the same folder."""
    folders = [resolved.parameters.output_path.absolute() for resolved in stages]
    shared = [resolved for resolved, folder in zip(stages, folders, strict=True) if folders.count(folder) > 1]
    if not shared:
        return stages
    names = " and ".join(str(resolved.stage) for resolved in shared)
    what = f"the stages {names} share the folder `{shared[0].parameters.output_path}` (`output_path`)"
    problem = Problem(what, "remove `output_path` from the stages", wrong_use=True)
    return tuple(replace(resolved, problems=(*resolved.problems, problem)) for resolved in stages)


def _has_no_value(name: str, value: Any) -> bool:
    """Return whether a flag's value is empty, or is the next flag, and report it."""
    setting = SETTINGS[name]
    flag = isinstance(value, str) and value.startswith("--")
    if not flag and not (value == "" and (setting.type_name == "path" or name in ("recipe", "only"))):
        return False
    hint = f"pass the value: `--{name} VALUE`"
    report(Problem(f"`{name}` takes {setting.type_words}, got `{value}` (`--{name}`)", hint, wrong_use=True))
    return True


def _load_quietly(load: Any, name: Any) -> Recipe | None:
    """Load a recipe; report its problems, and return None if it cannot be loaded."""
    if not name:
        return None
    try:
        loaded: Recipe = load(name)
    except DiffSynthError as error:
        report(*error.problems)
        return None
    report(*loaded.problems)
    return loaded


def _validate(values: dict[str, Any], origins: Mapping[str, Origin]) -> tuple[Parameters, set[str], list[Problem]]:
    """Return the parameters, the names of wrong ones (which are at their default), and their problems."""
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
            problems.append(_value_problem(name, values.get(name), detail, origins.get(name, DEFAULT)))
        kept = {name: value for name, value in values.items() if name not in invalid}
        return Parameters.model_validate(kept), invalid, problems


_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "less_than_equal": ("at most", "le"),
    "greater_than": ("more than", "gt"),
    "less_than": ("less than", "lt"),
}


def _is_nan(value: Any) -> bool:
    """Return whether a value is NaN, for which a message about bounds would be misleading."""
    try:
        return math.isnan(float(value))
    except (TypeError, ValueError):
        return False


def _value_problem(name: str, value: Any, detail: Any, origin: Origin) -> Problem:
    expected = SETTINGS[name].type_words
    if detail["type"] in _BOUNDS and not _is_nan(value):
        words, key = _BOUNDS[detail["type"]]
        expected = f"{expected} of {words} {detail['ctx'][key]}"
    shown = value if isinstance(value, str) else json.dumps(value, default=str)
    choice = suggest(shown, SETTINGS[name].choices)
    nearest = {"memory": nearest_memory, "duration": nearest_durations}.get(SETTINGS[name].type_name)
    near = nearest(shown) if nearest else [choice] if choice else []
    hint = f"did you mean {' or '.join(f'`{one}`' for one in near)}?" if near else None
    return Problem(f"`{name}` takes {expected}, got `{shown}` ({origin})", hint, wrong_use=True)


def independent_problems(problems: Iterable[Problem], invalid: AbstractSet[str]) -> list[Problem]:
    """Return the problems that do not concern a parameter in `invalid`.

    Checks see the default of such a parameter, which may not be what the user meant, so their findings about it would
    mislead. A problem concerns the parameters that its message and hint name, as `lora_rank` or `--lora_rank`.
    """
    return (
        [problem for problem in problems if invalid.isdisjoint(_parameters_named(problem))] if invalid else [*problems]
    )


def _parameters_named(problem: Problem) -> set[str]:
    """Return the parameters that a problem mentions."""
    words = re.findall(r"`(?:--(?:no-)?)?(\w+)\b", f"{problem.message} {problem.hint or ''}")
    return set(words) & SETTINGS.keys()


def _cross_problems(parameters: Parameters, invalid: set[str]) -> list[Problem]:
    """Return combinations of values that cannot work in any family."""
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
    low, high = parameters.min_timestep_boundary, parameters.max_timestep_boundary
    if int(low * TRAINING_TIMESTEPS) >= int(high * TRAINING_TIMESTEPS):
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
        if parameters.caption_dropout:
            what = f"`caption_dropout` cannot be used with `{task.name}`: its targets are made from their captions"
            problems.append(Problem(what, "remove it", wrong_use=True))
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


def parameters_of_other_families(parameters: Parameters, family: str, origins: Mapping[str, Origin]) -> list[Problem]:
    """Return the parameters that are set but do not apply to this family.

    A family that no declaration names, such as one registered from outside, decides by itself.
    """
    if not any(family in setting.families for setting in SETTINGS.values()):
        return []
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

"""From flags, a config file, a recipe and defaults to one set of parameters, with all problems at once."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from diffsynth_core.config.parameters import SETTINGS, Parameters
from diffsynth_core.config.recipes import Recipe, load_recipe, load_recipe_file, unknown_parameter
from diffsynth_core.errors import DiffSynthError, Problem


@dataclass(frozen=True)
class Resolved:
    """Parameters, what was wrong with them, and where each value came from.

    Values that were wrong are left at the default and named in `invalid`, so that the checks behind can go on.
    """

    parameters: Parameters
    family: str | None
    problems: tuple[Problem, ...]
    invalid: frozenset[str]
    incomplete: bool
    origins: Mapping[str, str] = field(default_factory=dict)

    def given(self, name: str) -> bool:
        """Whether a flag, a file or a recipe set the parameter."""
        return name in self.origins


def resolve(flags: Mapping[str, Any], unknown_flags: tuple[str, ...] = ()) -> Resolved:
    """Put the parameters together: flags > `--config` file > recipe > default.

    `flags` holds the values given on the command line by name, `unknown_flags` the arguments that no option took.
    """
    problems = [unknown_parameter(flag.removeprefix("--"), " (command line)") for flag in unknown_flags]
    flags = {name: value for name, value in flags.items() if not _slipped(name, value, problems)}
    sources: list[tuple[str, Mapping[str, Any]]] = []
    config = _load_quietly(lambda path: load_recipe_file(Path(path)), flags.get("config"), problems)
    recipe = _load_quietly(load_recipe, flags.get("recipe"), problems)
    if recipe:
        sources.append((f"recipe `{recipe.name}`", recipe.parameters))
    if config:
        sources.append((f"`{flags['config']}`", config.parameters))
    sources.append(("command line", flags))

    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, given in sources:
        for name, value in given.items():
            values[name] = value
            origins[name] = f"`--{name}`" if origin == "command line" else origin
    named = flags.get("recipe") or (config.name if config else None)
    if named and "output_path" not in values:
        values["output_path"] = f"models/train/{named}"

    parameters, invalid, faults = _validate(values, origins)
    problems += faults
    problems += _cross_problems(parameters, invalid)
    family = (config.family if config else None) or (recipe.family if recipe else None)
    problems += _unsupported(parameters, family, origins)
    incomplete = any(flags.get(name) and not loaded for name, loaded in (("config", config), ("recipe", recipe)))
    return Resolved(parameters, family, tuple(problems), frozenset(invalid), incomplete, origins)


def _slipped(name: str, value: Any, problems: list[Problem]) -> bool:
    """Whether a flag's value is empty, or is the next flag."""
    setting = SETTINGS[name]
    flag = isinstance(value, str) and value.startswith("--")
    if not flag and not (value == "" and (setting.type_name == "path" or name == "recipe")):
        return False
    hint = f"give the value: `--{name} VALUE`"
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


def _value_problem(name: str, value: Any, detail: Any, origin: str) -> Problem:
    expected = SETTINGS[name].type_words
    if detail["type"] in _BOUNDS:
        words, key = _BOUNDS[detail["type"]]
        expected = f"{expected} of {words} {detail['ctx'][key]}"
    shown = value if isinstance(value, str) else json.dumps(value, default=str)
    return Problem(f"`{name}` takes {expected}, got `{shown}` ({origin})", wrong_use=True)


def _cross_problems(parameters: Parameters, invalid: set[str]) -> list[Problem]:
    """Combinations that cannot work, whatever the family."""
    problems = []
    if (parameters.height is None) != (parameters.width is None) and not invalid & {"height", "width"}:
        given, missing = ("height", "width") if parameters.width is None else ("width", "height")
        problems.append(
            Problem(
                f"`{given}` is given without `{missing}`",
                f"give `--{missing}` too, or neither for dynamic resolution",
                wrong_use=True,
            )
        )
    if int(parameters.min_timestep_boundary * 1000) >= int(parameters.max_timestep_boundary * 1000):
        problems.append(
            Problem(
                f"`min_timestep_boundary` {parameters.min_timestep_boundary} is not below `max_timestep_boundary` {parameters.max_timestep_boundary}",
                "leave a range between them",
                wrong_use=True,
            )
        )
    if parameters.resume and parameters.rehearse:
        problems.append(
            Problem(
                "`rehearse` starts a run of its own and cannot `resume` one", "leave one of them out", wrong_use=True
            )
        )
    return problems


def _unsupported(parameters: Parameters, family: str | None, origins: Mapping[str, str]) -> list[Problem]:
    """Settings that were given and that this version, or this family, does not know what to do with."""
    problems = []
    for name, setting in SETTINGS.items():
        changed = name in origins and getattr(parameters, name) != setting.default
        if changed and setting.planned:
            problems.append(Problem(f"`{name}` is not supported yet ({origins[name]})", "leave it out", wrong_use=True))
        if changed and family and setting.families and family not in setting.families:
            problems.append(
                Problem(
                    f"`{name}` has no meaning for {family}; it belongs to {', '.join(setting.families)} ({origins[name]})",
                    "leave it out",
                    wrong_use=True,
                )
            )
    if parameters.task != "sft":
        problems.append(Problem(f"`task` `{parameters.task}` is not supported yet", "use `sft`", wrong_use=True))
    if parameters.lora_target_modules == ():
        problems.append(
            Problem(
                "choosing target modules automatically (an empty `lora_target_modules`) is not supported yet",
                "name the modules, or leave it out for the family's list",
                wrong_use=True,
            )
        )
    return problems

"""Recipes: named YAML files that supply parameters, with single inheritance, stages and a closed schema."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffsynth_core.config.parameters import SETTINGS
from diffsynth_core.config.unknown_names import unknown_parameter
from diffsynth_core.config.yaml_files import read_yaml
from diffsynth_core.errors import DiffSynthError, FaultsFound, Problem, kind_of, raise_if_any, suggest

RECIPE_KEYS = {
    "extends": "Recipe to inherit values from",
    "description": "One-line description for `diffsynth recipe list`",
    "family": "Model family",
    "parameters": "Parameter values",
    "stages": "Runs of one command, by name and in order; the parameters of a stage take precedence over those of the recipe",
}
STAGE_KEYS = {
    "description": "One-line description of what the stage trains",
    "parameters": "Parameter values for this stage",
}
STAGE_NAME = r"[a-z0-9][a-z0-9_-]*"
"""A stage names a folder; capitals are left out, since some file systems do not tell them apart."""
NOT_IN_RECIPES = frozenset({"recipe", "config", "only", "rehearse", "dry_run", "verbose", "resume"})
"""Settings that say what one command does; a recipe describes every run made from it."""


@dataclass(frozen=True)
class Overrides:
    """The values of one source, as they stand there: those for all stages, and by stage those that go over them."""

    parameters: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A recipe with its inheritance resolved.

    `layers` holds the values of the file last, before it those of the recipe it extends, and so on: a later layer goes
    over all of an earlier one. `stages` holds the description of each stage, in the order in which they run.
    """

    name: str
    description: str
    family: str | None
    layers: tuple[Overrides, ...]
    stages: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    @property
    def parameters(self) -> dict[str, Any]:
        """The values for all stages."""
        return {name: value for layer in self.layers for name, value in layer.parameters.items()}


def launcher_presets() -> dict[str, Path]:
    """The configurations for accelerate's launcher that come with the recipes, by name."""
    return {path.stem: path for path in sorted((recipe_folder() / "accelerate").glob("*.yaml"))}


def recipe_folder() -> Path:
    """Where the recipes lie: in the installed package, else in the checkout of an editable install."""
    package = Path(str(files("diffsynth_core")))
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parents[1] / "recipes"


@cache
def recipe_names() -> tuple[str, ...]:
    """Names of all recipes, sorted."""
    return tuple(sorted(path.stem for path in recipe_folder().glob("*.yaml")))


def load_recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        FaultsFound: when there is none (the nearest name is offered) or its file is faulty.
    """
    if name not in recipe_names():
        hint = f"pass your own file as `--config {name}`" if Path(name).is_file() else _nearest_recipe(name)
        raise FaultsFound([Problem(f"there is no recipe `{name}`", hint, wrong_use=True)])
    recipe = load_recipe_file(recipe_folder() / f"{name}.yaml")
    raise_if_any(recipe.problems)
    return recipe


def _nearest_recipe(name: str) -> str:
    """The hint for a name that no recipe has."""
    near = suggest(name, recipe_names())
    return f"did you mean `{near}`?" if near else "see `diffsynth recipe list`"


def load_config(name: str) -> Recipe:
    """The values in a file of the user's own, given as `--config`.

    Raises:
        DiffSynthError: when the file cannot be read, or only a recipe has that name.
    """
    if name in recipe_names() and not Path(name).exists():
        what = f"`--config` takes a file, but `{name}` is a recipe"
        raise FaultsFound([Problem(what, f"pass `--recipe {name}`", wrong_use=True)])
    return load_recipe_file(Path(name))


def load_recipe_file(path: Path) -> Recipe:
    """The recipe in a YAML file, the recipe it extends filled in; wrong keys are left out and told in its `problems`.

    Raises:
        DiffSynthError: when the file cannot be read.
    """
    return _load(path, ())


def _load(path: Path, below: tuple[Path, ...]) -> Recipe:
    if path in below:
        raise DiffSynthError(f"`{path}` extends itself", "extend another recipe")
    content = read_yaml(path)
    problems = _key_problems(path, content)
    parent = Recipe("", "", None, ())
    try:
        if isinstance(content.get("extends"), str):
            parent = _load(_parent_path(path, content["extends"]), (*below, path))
    except DiffSynthError as error:
        problems += error.problems
    family = content.get("family", parent.family)
    stages = _known_stages(content.get("stages"))
    described = {name: str(stage.get("description", parent.stages.get(name, ""))) for name, stage in stages.items()}
    layer = Overrides(
        _known_parameters(content.get("parameters")),
        {name: _known_parameters(stage.get("parameters")) for name, stage in stages.items()},
    )
    return Recipe(
        name=path.stem,
        description=str(content.get("description", "")),
        family=family if isinstance(family, str) else None,
        layers=(*parent.layers, layer),
        stages={**parent.stages, **described},
        problems=(*problems, *parent.problems),
    )


def _known_parameters(given: Any) -> dict[str, Any]:
    """Of what a file gives as parameters, those that a file may set."""
    if not isinstance(given, dict):
        return {}
    return {name: value for name, value in given.items() if name in SETTINGS and name not in NOT_IN_RECIPES}


def _known_stages(given: Any) -> dict[str, dict[str, Any]]:
    """Of what a file gives as stages, those with a proper name; one that is blank or no object has no keys."""
    if not isinstance(given, dict):
        return {}
    return {name: stage if isinstance(stage, dict) else {} for name, stage in given.items() if _is_stage_name(name)}


def _is_stage_name(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(STAGE_NAME, name) is not None


def _parent_path(path: Path, name: str) -> Path:
    if name not in recipe_names():
        what = f"`{path}` extends `{name}`, which is not a recipe; only recipes can be extended"
        raise FaultsFound([Problem(what, _nearest_recipe(name), wrong_use=True)])
    return recipe_folder() / f"{name}.yaml"


def _key_problems(path: Path, content: Mapping[str, Any]) -> list[Problem]:
    """What in a recipe file is no part of the closed schema."""
    if not content:
        return [Problem(f"`{path}` is empty", "add `parameters:` with the values below it", wrong_use=True)]
    problems = []
    for key, value in content.items():
        if key not in RECIPE_KEYS:
            problems.append(_unknown_key(key, "recipe", RECIPE_KEYS, f"`{path}`"))
        elif key == "parameters":
            problems += _parameter_problems(value, f"`{path}`")
        elif key == "stages":
            problems += _stages_problems(value, f"`{path}`")
        elif not isinstance(value, str):
            problems.append(Problem(f"`{path}`: `{key}` takes a string, got `{value}`", wrong_use=True))
    return problems


def _stages_problems(stages: Any, where: str) -> list[Problem]:
    """What below `stages:` is no part of the closed schema."""
    if stages is not None and not isinstance(stages, dict):
        what = f"`stages` is {kind_of(stages)}, expected stage names and their keys"
        return [Problem(f"{where}: {what}", wrong_use=True)]
    problems = []
    for name, stage in (stages or {}).items():
        if not _is_stage_name(name):
            hint = "use lowercase letters, digits, `-` and `_`: a folder gets this name"
            problems.append(Problem(f"{where}: `{name}` is not a valid stage name", hint, wrong_use=True))
        problems += _stage_problems(stage, f"{where}, stage `{name}`")
    return problems


def _stage_problems(stage: Any, where: str) -> list[Problem]:
    """What in one stage is no part of the closed schema."""
    if stage is not None and not isinstance(stage, dict):
        what = f"is {kind_of(stage)}, expected the keys {' and '.join(STAGE_KEYS)}"
        return [Problem(f"{where} {what}", wrong_use=True)]
    problems = []
    for key, value in (stage or {}).items():
        if key not in STAGE_KEYS:
            problems.append(_unknown_key(key, "stage", STAGE_KEYS, where))
        elif key == "parameters":
            problems += _parameter_problems(value, where)
        elif not isinstance(value, str):
            problems.append(Problem(f"{where}: `{key}` takes a string, got `{value}`", wrong_use=True))
    return problems


def _unknown_key(key: str, kind: str, keys: Mapping[str, str], where: str) -> Problem:
    hint = "move it below `parameters:`" if key in SETTINGS else f"a {kind} has the keys {', '.join(keys)}"
    return Problem(f"{where}: `{key}` is not a key of a {kind}", hint, wrong_use=True)


def _parameter_problems(given: Any, where: str) -> list[Problem]:
    """What below `parameters:` is no parameter, or none for a file."""
    if given is not None and not isinstance(given, dict):
        what = f"`parameters` is {kind_of(given)}, expected names and values"
        return [Problem(f"{where}: {what}", wrong_use=True)]
    unknown = [unknown_parameter(str(name), f" in {where}") for name in given or {} if name not in SETTINGS]
    misplaced = [
        Problem(
            f"`{name}` in {where} applies to a single command and cannot be set in a file",
            "pass it as a flag",
            wrong_use=True,
        )
        for name in given or {}
        if name in NOT_IN_RECIPES
    ]
    return unknown + misplaced

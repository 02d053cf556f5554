"""Recipes: named YAML files of parameters, with single inheritance, stages and a closed schema."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffsynth_core.config.parameters import ALIASES, SETTINGS
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
"""Key of a recipe -> its description in the JSON schema."""
STAGE_KEYS = {
    "description": "One-line description of what the stage trains",
    "parameters": "Parameter values for this stage",
}
"""Key of a stage -> its description in the JSON schema."""
STAGE_NAME = r"[a-z0-9][a-z0-9_-]*"
"""Pattern of stage names. Each names a folder, so it is in lower case: some file systems ignore case."""
NOT_IN_RECIPES = frozenset(name for name, setting in SETTINGS.items() if not setting.in_recipes)
"""Parameters of a single command, not allowed in a recipe, which describes all runs that use it."""


@dataclass(frozen=True)
class Overrides:
    """The values in one source: those for all stages, and by stage those that take precedence over them."""

    parameters: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A recipe with its inheritance resolved.

    Attributes:
        layers: values of each file in the inheritance chain, the base first; a later layer overrides all earlier ones,
            including their values by stage.
        stages: description of each stage, in the order in which the stages run.
        problems: wrong keys, whose values are omitted from `layers`.
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
    """Return the configurations for accelerate's launcher that are shipped with the recipes, by name."""
    return {path.stem: path for path in sorted((recipe_folder() / "accelerate").glob("*.yaml"))}


def recipe_folder() -> Path:
    """Return the folder of the recipes: in the installed package, or in the checkout of an editable install."""
    package = Path(str(files("diffsynth_core")))
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parents[1] / "recipes"


@cache
def recipe_names() -> tuple[str, ...]:
    """Return the names of all recipes, sorted."""
    return tuple(sorted(path.stem for path in recipe_folder().glob("*.yaml")))


def load_recipe(name: str) -> Recipe:
    """Load the recipe called `name`.

    Raises:
        FaultsFound: if there is no such recipe (the hint is the closest name), or its file is invalid.
    """
    if name not in recipe_names():
        hint = f"pass your own file as `--config {name}`" if Path(name).is_file() else _nearest_recipe(name)
        raise FaultsFound([Problem(f"there is no recipe `{name}`", hint, wrong_use=True)])
    recipe = load_recipe_file(recipe_folder() / f"{name}.yaml")
    raise_if_any(recipe.problems)
    return recipe


def _nearest_recipe(name: str) -> str:
    """Return the hint for an unknown recipe name."""
    near = suggest(name, recipe_names())
    return f"did you mean `{near}`?" if near else "see `diffsynth recipe list`"


def load_config(name: str) -> Recipe:
    """Load a file given as `--config`.

    Raises:
        DiffSynthError: if the file cannot be read, or `name` is that of a recipe.
    """
    if name in recipe_names() and not Path(name).exists():
        what = f"`--config` takes a file, but `{name}` is a recipe"
        raise FaultsFound([Problem(what, f"pass `--recipe {name}`", wrong_use=True)])
    return load_recipe_file(Path(name))


def load_recipe_file(path: Path) -> Recipe:
    """Load a YAML file and the recipe that it extends; invalid keys are omitted and reported in `Recipe.problems`.

    Raises:
        DiffSynthError: if the file cannot be read.
    """
    return _load(path, ())


def _load(path: Path, extended_by: tuple[Path, ...]) -> Recipe:
    if path in extended_by:
        raise DiffSynthError(f"`{path}` extends itself", "extend another recipe")
    content = read_yaml(path)
    problems = _key_problems(path, content)
    parent = Recipe("", "", None, ())
    try:
        if isinstance(content.get("extends"), str):
            parent = _load(_parent_path(path, content["extends"]), (*extended_by, path))
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
    """Return those of the given parameters that a file may set."""
    if not isinstance(given, dict):
        return {}
    named = {ALIASES.get(name, name): value for name, value in given.items()}
    return {name: value for name, value in named.items() if name in SETTINGS and name not in NOT_IN_RECIPES}


def _known_stages(given: Any) -> dict[str, dict[str, Any]]:
    """Return the stages with a valid name; an empty or malformed stage counts as one without keys."""
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
    """Return the keys of a recipe file that are not part of the schema."""
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
    """Return what is wrong below `stages:`."""
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
    """Return what is wrong in one stage."""
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
    """Return the names below `parameters:` that are not parameters, or not allowed in a file."""
    if given is not None and not isinstance(given, dict):
        what = f"`parameters` is {kind_of(given)}, expected names and values"
        return [Problem(f"{where}: {what}", wrong_use=True)]
    known = {*SETTINGS, *ALIASES}
    unknown = [unknown_parameter(str(name), f" in {where}") for name in given or {} if name not in known]
    twice = [
        Problem(f"`{alias}` in {where} is another name of `{name}`, which is set too", "remove one", wrong_use=True)
        for alias, name in ALIASES.items()
        if alias in (given or {}) and name in (given or {})
    ]
    misplaced = [
        Problem(
            f"`{name}` in {where} applies to a single command and cannot be set in a file",
            "pass it as a flag",
            wrong_use=True,
        )
        for name in given or {}
        if name in NOT_IN_RECIPES
    ]
    return unknown + twice + misplaced

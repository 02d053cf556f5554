"""Recipes: named YAML files that supply parameters, with single inheritance and a closed schema."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffsynth_core.config.parameters import SETTINGS
from diffsynth_core.config.yaml_files import read_yaml
from diffsynth_core.errors import DiffSynthError, FaultsFound, Problem, raise_if_any, suggest

RECIPE_KEYS = {
    "extends": "Recipe whose values this one starts from",
    "description": "One line for `diffsynth recipe list`",
    "family": "Model family",
    "parameters": "Values of parameters",
}
NOT_IN_RECIPES = frozenset({"recipe", "config", "rehearse", "dry_run", "resume"})
"""Settings that say what one command does; a recipe describes every run made from it."""


@dataclass(frozen=True)
class Recipe:
    """A recipe with its inheritance resolved; `parameters` holds the values as they stand in the YAML."""

    name: str
    description: str
    family: str | None
    parameters: Mapping[str, Any]
    problems: tuple[Problem, ...] = ()


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
        near = suggest(name, recipe_names())
        hint = f"did you mean `{near}`?" if near else "`diffsynth recipe list` names them all"
        raise FaultsFound([Problem(f"there is no recipe `{name}`", hint, wrong_use=True)])
    recipe = load_recipe_file(recipe_folder() / f"{name}.yaml")
    raise_if_any(recipe.problems)
    return recipe


def load_recipe_file(path: Path) -> Recipe:
    """The recipe in a YAML file, the recipe it extends filled in; wrong keys are left out and told in its `problems`.

    Raises:
        DiffSynthError: when the file cannot be read.
    """
    return _load(path, ())


def _load(path: Path, below: tuple[Path, ...]) -> Recipe:
    if path in below:
        raise DiffSynthError(f"`{path}` extends itself", "let it extend another recipe")
    content = read_yaml(path)
    problems = _key_problems(path, content)
    parent = Recipe("", "", None, {})
    try:
        if isinstance(content.get("extends"), str):
            parent = _load(_parent_path(path, content["extends"]), (*below, path))
    except DiffSynthError as error:
        problems += error.problems
    family = content.get("family", parent.family)
    given = content.get("parameters")
    known = (
        {k: v for k, v in given.items() if k in SETTINGS and k not in NOT_IN_RECIPES} if isinstance(given, dict) else {}
    )
    return Recipe(
        name=path.stem,
        description=str(content.get("description", "")),
        family=family if isinstance(family, str) else None,
        parameters={**parent.parameters, **known},
        problems=(*problems, *parent.problems),
    )


def _parent_path(path: Path, name: str) -> Path:
    if name not in recipe_names():
        near = suggest(name, recipe_names())
        hint = f"did you mean `{near}`?" if near else "`diffsynth recipe list` names them all"
        raise FaultsFound([Problem(f"`{path}` extends `{name}`, which is not a recipe", hint, wrong_use=True)])
    return recipe_folder() / f"{name}.yaml"


def _key_problems(path: Path, content: Mapping[str, Any]) -> list[Problem]:
    """What in a recipe file is no key of the closed schema."""
    problems = []
    for key, value in content.items():
        if key not in RECIPE_KEYS:
            hint = (
                "put it below `parameters:`" if key in SETTINGS else f"a recipe has the keys {', '.join(RECIPE_KEYS)}"
            )
            problems.append(Problem(f"`{path}`: `{key}` is not a key of a recipe", hint, wrong_use=True))
        elif key == "parameters":
            if value is not None and not isinstance(value, dict):
                problems.append(
                    Problem(
                        f"`{path}`: `parameters` holds a {type(value).__name__}, expected names and values",
                        wrong_use=True,
                    )
                )
                continue
            problems += [unknown_parameter(str(name), f" in `{path}`") for name in value or {} if name not in SETTINGS]
            problems += [
                Problem(
                    f"`{name}` in `{path}` says what one command does and has no place in a file",
                    "give it as a flag",
                    wrong_use=True,
                )
                for name in value or {}
                if name in NOT_IN_RECIPES
            ]
        elif not isinstance(value, str):
            problems.append(Problem(f"`{path}`: `{key}` takes a text, got `{value}`", wrong_use=True))
    return problems


def unknown_parameter(name: str, where: str) -> Problem:
    """The problem that `name` is no parameter, with the nearest name."""
    near = suggest(name, SETTINGS)
    hint = f"did you mean `{near}`?" if near else "`diffsynth train --help` lists them all"
    return Problem(f"`{name}`{where} is not a parameter", hint, wrong_use=True)

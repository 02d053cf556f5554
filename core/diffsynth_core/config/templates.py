"""A commented configuration file: the values of a recipe, with all other parameters commented out."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from diffsynth_core.config.documents import format_value
from diffsynth_core.config.parameters import GROUPS, SETTINGS, Setting, as_plain
from diffsynth_core.config.recipes import NOT_IN_RECIPES, load_recipe
from diffsynth_core.config.resolve import Resolved, resolve_stages
from diffsynth_core.errors import raise_if_any

WIDTH = 100
"""Line width of comments."""
Values = dict[str, Any]
"""Parameters by name, in the plain form of `as_plain`."""


def template_of(name: str) -> str:
    """Return a `--config` file that reproduces a recipe.

    Values of the recipe are set. All other parameters are commented out with their defaults, to be changed in place;
    one of them is `output_path`, because a run is named after its file.

    Raises:
        FaultsFound: if there is no such recipe.
    """
    recipe = load_recipe(name)
    stages = resolve_stages({"recipe": name})
    raise_if_any([problem for resolved in stages for problem in resolved.problems])
    shared = _shared_values(stages)
    lines = [
        f"# A starting point with the values of the recipe `{name}`: `diffsynth train --config FILE`",
        "# Commented-out parameters are not set and show the default. `diffsynth recipe schema` prints a schema for editors.",
        f"# To follow later changes of the recipe, delete what you do not change and add `extends: {name}`.",
        *_dumped({"description": recipe.description, "family": recipe.family}),
        "parameters:",
        *_indented(_parameter_lines(shared, recipe.family)),
    ]
    if recipe.stages:
        lines.append("stages:")
        for resolved in stages:
            own = {key: value for key, value in _given(resolved).items() if key not in shared}
            stage = {"description": recipe.stages[resolved.stage or ""]}
            lines += [f"  {resolved.stage}:", *_indented(_dumped(stage), 4), "    parameters:"]
            lines += _indented(_dumped(own), 6)
    return "\n".join(line.rstrip() for line in lines)


def _given(resolved: Resolved) -> Values:
    """Return the plain values that the recipe sets for a stage."""
    return {name: value for name, value in as_plain(resolved.parameters).items() if resolved.origin(name).is_given}


def _shared_values(stages: Iterable[Resolved]) -> Values:
    """Return the values that are equal in all stages."""
    first, *others = (_given(resolved) for resolved in stages)
    return {
        name: value for name, value in first.items() if all(name in other and other[name] == value for other in others)
    }


def _parameter_lines(values: Mapping[str, Any], family: str | None) -> Iterator[str]:
    """Yield all parameters that apply to a family by group, each below its description."""
    for group, title in GROUPS.items():
        members = [setting for setting in SETTINGS.values() if setting.group == group and _belongs(setting, family)]
        if members:
            yield from ("", f"# {title}")
        for setting in members:
            yield from ("", *(f"# {line}" for line in textwrap.wrap(_explained(setting), WIDTH)))
            if setting.name in values:
                yield from _dumped({setting.name: values[setting.name]})
            else:
                yield f"#{setting.name}: {_shown_default(setting, family)}"


def _belongs(setting: Setting, family: str | None) -> bool:
    return setting.name not in NOT_IN_RECIPES and (not setting.families or family in setting.families)


def _explained(setting: Setting) -> str:
    """Return the description, type and unit of a parameter."""
    unit = [f"unit: {setting.unit}"] if setting.unit else []
    return f"{setting.help_text} [{'; '.join([setting.type_words, *unit])}]"


def _shown_default(setting: Setting, family: str | None) -> str:
    """Return a default as YAML on one line; empty if there is none."""
    default = setting.default_of(family)
    if default is None:
        return ""
    plain = list(default) if isinstance(default, tuple) else default
    return _inline(plain if isinstance(plain, bool | int | float | list) else format_value(plain))


def _dumped(values: Mapping[str, Any]) -> list[str]:
    """Return keys and values as YAML, one key per line."""
    return [f"{key}: {_inline(value)}" for key, value in values.items()]


def _inline(value: Any) -> str:
    """Return a value as YAML on one line: dumped as the only item of a list, without the brackets."""
    text: str = yaml.safe_dump([value], allow_unicode=True, width=10**6, default_flow_style=True)
    return text.strip()[1:-1]


def _indented(lines: Iterable[str], columns: int = 2) -> list[str]:
    return [f"{' ' * columns}{line}" if line else "" for line in lines]

"""A generated config file reproduces the run of its recipe, and contains every parameter."""

import re
from pathlib import Path

import pytest

from diffsynth_core.config.parameters import SETTINGS
from diffsynth_core.config.recipes import NOT_IN_RECIPES, recipe_names
from diffsynth_core.config.resolve import resolve_stages
from diffsynth_core.config.templates import template_of

NAMES_THE_SOURCE = {"recipe", "config"}


def values_of(flags: dict) -> list[dict]:
    stages = resolve_stages(flags)
    assert not [problem for resolved in stages for problem in resolved.problems]
    return [
        {"family": resolved.family, **resolved.parameters.model_dump(exclude=NAMES_THE_SOURCE)} for resolved in stages
    ]


def written(folder: Path, name: str, text: str) -> str:
    """A file with that name, because a run is named after its file."""
    path = folder / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", recipe_names())
def test_it_gives_the_run_of_its_recipe(tmp_path, name):
    config = written(tmp_path, name, template_of(name))
    assert values_of({"config": config}) == values_of({"recipe": name})


@pytest.mark.parametrize("name", recipe_names())
def test_the_defaults_it_shows_are_defaults(tmp_path, name):
    """Uncommenting lines changes nothing, apart from empty values."""
    text = re.sub(r"^  #(?=[a-z0-9_]+: \S)(?!output_path)", "  ", template_of(name), flags=re.MULTILINE)
    assert values_of({"config": written(tmp_path, name, text)}) == values_of({"recipe": name})


def test_it_holds_every_parameter_of_the_family_once(says):
    text = template_of("qwen-image-lora")
    expected = {
        name
        for name, setting in SETTINGS.items()
        if name not in NOT_IN_RECIPES and (not setting.families or "qwen-image" in setting.families)
    }
    shown = re.findall(r"^  #?([a-z0-9_]+):", text, flags=re.MULTILINE)
    assert len(shown) == len(set(shown)) and set(shown) == expected
    assert "  #output_path: " in text
    says(text)


def test_it_holds_what_stages_differ_in(says):
    text = template_of("wan2.2-t2v-a14b-lora")
    assert text.count("max_timestep_boundary: ") == 3, "shown once, set in both stages"
    says(text.partition("stages:")[2])


def test_the_command_prints_it(cli, tmp_path):
    outcome = cli("recipe", "show", "qwen-image-lora", "--format", "template")
    assert (outcome.code, outcome.out) == (0, template_of("qwen-image-lora") + "\n")

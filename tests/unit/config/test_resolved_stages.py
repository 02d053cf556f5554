"""Recipes and files with stages: origins of the values of each stage, and their problems."""

from pathlib import Path

import pytest

from diffsynth_core.config.resolve import resolve, resolve_stages
from diffsynth_core.errors import Problem
from tests.naming import in_any_order, names


def messages(resolved) -> list[str]:
    return [problem.message for problem in resolved.problems]


STAGED = """
extends: qwen-image-lora
parameters:
  num_epochs: 3
stages:
  high:
    parameters: {max_timestep_boundary: 0.4, learning_rate: 2e-4}
  low:
    parameters: {min_timestep_boundary: 0.4, learning_rate: 2e-4}
"""


@pytest.fixture
def staged_recipe(tmp_path, monkeypatch):
    """A shipped recipe with stages, called `staged`."""
    from diffsynth_core.config import recipes

    folder = tmp_path / "recipes"
    folder.mkdir()
    text = STAGED.replace("extends: qwen-image-lora", "family: qwen-image").replace(
        "parameters:\n", "parameters:\n  seed: 1\n", 1
    )
    (folder / "staged.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(recipes, "recipe_folder", lambda: folder)
    monkeypatch.setattr(recipes, "recipe_names", lambda: ("staged",))


def values_of(stages, name: str) -> list:
    return [getattr(resolved.parameters, name) for resolved in stages]


def test_without_stages_there_is_one_entry():
    (resolved,) = resolve_stages({"recipe": "qwen-image-lora"})
    assert resolved == resolve({"recipe": "qwen-image-lora"})
    assert (resolved.stage, resolved.parameters.only) == (None, None)


def test_each_stage_has_its_values_and_its_folder(config):
    path = config(STAGED)
    stages = resolve_stages({"config": path, "lora_rank": "4"})
    assert [resolved.problems for resolved in stages] == [(), ()]
    assert [resolved.stage for resolved in stages] == values_of(stages, "only") == ["high", "low"]
    assert values_of(stages, "max_timestep_boundary") == [0.4, 1.0]
    assert values_of(stages, "min_timestep_boundary") == [0.0, 0.4]
    assert values_of(stages, "learning_rate") == [2e-4, 2e-4]
    assert values_of(stages, "num_epochs") == [3, 3] and values_of(stages, "lora_rank") == [4, 4]
    assert values_of(stages, "output_path") == [Path("models/train/run/high"), Path("models/train/run/low")]
    assert str(stages[0].origin("learning_rate")) == f"`{path}`, stage `high`"
    assert stages[0].family == "qwen-image"


def test_a_command_of_several_stages_is_not_one_run(config):
    with pytest.raises(ValueError, match="too many values"):
        resolve({"config": config(STAGED)})
    assert resolve({"config": config(STAGED), "only": "low"}).stage == "low"


@pytest.mark.parametrize(
    ("flags", "text", "expected"),
    [
        ({}, None, [2e-4, 2e-4]),
        ({}, "parameters: {learning_rate: 3e-4}\n", [3e-4, 3e-4]),
        ({}, "stages: {low: {parameters: {learning_rate: 4e-4}}}\n", [2e-4, 4e-4]),
        ({}, "parameters: {learning_rate: 3e-4}\nstages: {low: {parameters: {learning_rate: 4e-4}}}\n", [3e-4, 4e-4]),
        ({"learning_rate": "5e-4"}, "parameters: {learning_rate: 3e-4}\n", [5e-4, 5e-4]),
    ],
)
def test_flags_then_the_stage_then_the_rest_of_the_file_then_those_of_the_recipe(
    config, staged_recipe, flags, text, expected
):
    flags = {"recipe": "staged", **flags, **({"config": config(text)} if text else {})}
    stages = resolve_stages(flags)
    assert [resolved.problems for resolved in stages] == [(), ()]
    assert values_of(stages, "learning_rate") == expected
    assert values_of(stages, "seed") == [1, 1]


def test_a_file_adds_its_stages_behind_those_of_the_recipe(config, staged_recipe):
    path = config("stages:\n  again: {parameters: {seed: 5}}\n  low: {parameters: {seed: 4}}\n")
    stages = resolve_stages({"recipe": "staged", "config": path})
    assert [resolved.stage for resolved in stages] == ["high", "low", "again"]
    assert values_of(stages, "seed") == [1, 4, 5]


def test_a_file_that_extends_stages_goes_over_all_of_them(config, staged_recipe):
    stages = resolve_stages({"config": config("extends: staged\nparameters: {learning_rate: 3e-4}\n")})
    assert values_of(stages, "learning_rate") == [3e-4, 3e-4]
    assert values_of(stages, "max_timestep_boundary") == [0.4, 1.0]


DIFFERS = names("max_timestep_boundary", "high and low")


def conflicts(stages) -> list[tuple[str, str | None]]:
    """Each problem once, however many stages have it."""
    return list(dict.fromkeys((problem.message, problem.hint) for resolved in stages for problem in resolved.problems))


def problems_of(stages) -> list[Problem]:
    return list(dict.fromkeys(problem for resolved in stages for problem in resolved.problems))


def test_one_value_for_stages_that_differ_is_told(says, config):
    path = config(STAGED)
    stages = resolve_stages({"config": path, "max_timestep_boundary": "0.5", "learning_rate": "1e-3"})
    says(problems_of(stages))
    assert conflicts(stages) == [(names(DIFFERS, "--max_timestep_boundary"), names("--only"))]
    assert all(problem.wrong_use for resolved in stages for problem in resolved.problems)
    only = resolve({"config": path, "max_timestep_boundary": "0.5", "only": "high"})
    assert only.problems == () and only.parameters.max_timestep_boundary == 0.5


@pytest.mark.parametrize("start", ["", "extends: staged\n"])
def test_one_value_in_a_file_for_stages_that_differ_is_told(says, config, staged_recipe, start):
    path = config(f"{start}parameters: {{max_timestep_boundary: 0.5}}\n")
    flags = {"config": path} if start else {"recipe": "staged", "config": path}
    stages = resolve_stages(flags)
    says(problems_of(stages))
    assert conflicts(stages) == [(names(DIFFERS, path), names("--only"))]
    assert resolve({**flags, "only": "high"}).problems == ()


def test_a_value_that_the_stages_of_the_same_file_go_over_is_no_conflict(config, staged_recipe):
    both = "stages: {high: {parameters: {max_timestep_boundary: 0.3}}, low: {parameters: {max_timestep_boundary: 0.9}}}"
    stages = resolve_stages(
        {"recipe": "staged", "config": config(f"parameters: {{max_timestep_boundary: 0.5}}\n{both}\n")}
    )
    assert conflicts(stages) == [] and values_of(stages, "max_timestep_boundary") == [0.3, 0.9]


def test_equal_values_in_other_words_are_no_conflict(config):
    text = "stages: {a: {parameters: {trainable_models: 'dit,vae'}}, b: {parameters: {trainable_models: [dit, vae]}}, c: {parameters: {lora_rank: 32, trainable_models: 'dit, vae'}}}"
    assert conflicts(resolve_stages({"config": config(text), "trainable_models": "dit", "lora_rank": "8"})) == []


@pytest.mark.parametrize(
    ("flags", "replaced", "folders"),
    [
        ({"output_path": "here"}, ("", ""), ["here/high", "here/low"]),
        ({"output_path": "here", "only": "low"}, ("", ""), ["here/low"]),
        ({"only": "high"}, ("", ""), ["models/train/run/high"]),
        ({}, ("num_epochs: 3", "output_path: there"), ["there/high", "there/low"]),
        ({}, ("max_timestep_boundary: 0.4", "output_path: mine"), ["mine", "models/train/run/low"]),
        ({"output_path": "here"}, ("max_timestep_boundary: 0.4", "output_path: mine"), ["here/high", "here/low"]),
    ],
)
def test_the_folder_of_a_stage(config, flags, replaced, folders):
    stages = resolve_stages({"config": config(STAGED.replace(*replaced)), **flags})
    assert [resolved.problems for resolved in stages] == [()] * len(folders)
    assert [str(folder) for folder in values_of(stages, "output_path")] == folders


def test_two_stages_in_one_folder_are_told(says, config):
    stages = resolve_stages(
        {"config": config("stages: {a: {parameters: {output_path: x}}, b: {parameters: {output_path: ./x}}}")}
    )
    says(problems_of(stages))
    assert conflicts(stages) == [(names("a and b", "x", "output_path"), names("output_path"))]


@pytest.mark.parametrize(
    ("only", "hint"),
    [("hihg", names("high")), ("zzz", names("high, low")), ("High", names("high"))],
)
def test_an_unknown_stage_is_told_once_and_hides_nothing(says, config, only, hint):
    stages = resolve_stages({"config": config(STAGED), "only": only, "lora_rank": "x", "max_timestep_boundary": "0.5"})
    says(problems_of(stages))
    assert conflicts(stages) == in_any_order(
        (names("no stage", only, "--only"), hint), (names("lora_rank", "an integer", "x", "--lora_rank"), None)
    )


def test_only_needs_stages(says):
    (problem,) = resolve({"recipe": "qwen-image-lora", "only": "high"}).problems
    says([problem])
    assert problem.message == names("only", "high", "no stages")
    assert problem.hint == names("remove it", "recipe with stages") and problem.wrong_use


def test_only_is_not_told_beside_a_recipe_that_is_not_there():
    assert len(resolve({"recipe": "xyz", "only": "high"}).problems) == 1


@pytest.mark.parametrize("value", ["", "--resume"])
def test_only_without_its_value_is_told(says, config, value):
    stages = resolve_stages({"config": config(STAGED), "only": value})
    says(problems_of(stages))
    assert conflicts(stages) == [(names("only", "a string", f"`{value}`", "--only"), names("--only VALUE"))]


def test_a_wrong_value_in_a_stage_names_the_stage(says, config):
    path = config(STAGED.replace("max_timestep_boundary: 0.4", "max_timestep_boundary: 2"))
    high, low = resolve_stages({"config": path, "seed": "-1"})
    says(high.problems)
    seed = names("seed", "at least 0", "-1", "--seed")
    assert messages(low) == [seed]
    assert sorted(messages(high)) == [
        names("max_timestep_boundary", "at most 1.0", 2, path, "stage `high`"),
        seed,
    ]


def test_each_stage_is_copied_to_a_place_of_its_own(staged_recipe):
    stages = resolve_stages({"recipe": "staged", "mirror": "s3://bucket/run/", "push_to_hub": "alice/keyhole"})
    assert values_of(stages, "mirror") == ["s3://bucket/run/high", "s3://bucket/run/low"]
    assert values_of(stages, "push_to_hub") == ["alice/keyhole-high", "alice/keyhole-low"]
    assert values_of(resolve_stages({"recipe": "staged"}), "mirror") == [None, None]

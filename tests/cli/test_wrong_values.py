"""A wrong value is one problem: the default used instead has no consequences."""

import json

import pytest

from diffsynth_core.config.parameters import SETTINGS
from diffsynth_core.config.recipes import NOT_IN_RECIPES
from tests.naming import names

GIVEN_AS_FLAGS = {"max_steps", "device", "dataset_base_path", "dataset_num_workers"}
"""Set by the fixture `refuse`, overriding files."""
TAKE_MAPPINGS = {name for name, setting in SETTINGS.items() if setting.type_name in ("arguments", "quant options")}
IN_FILES = [name for name in SETTINGS if name not in NOT_IN_RECIPES | GIVEN_AS_FLAGS | TAKE_MAPPINGS]
ON_COMMAND_LINES = {"int": "many", "float": "fast", "memory": "24", "json list": "{", "path": "", "number pair": "0.9",
                    "arguments": "fused", "quant options": "nf4", "blocks": "all", "duration": "90",
                    "split": ""}  # fmt: skip
"""Type -> a string that no flag of that type accepts; strings and lists of strings accept any."""


@pytest.mark.parametrize("name", IN_FILES)
def test_in_a_file(refuse, config, name):
    path = config(f"parameters:\n  {name}: {{a: 1}}\n")
    code, problems = refuse("--config", path)
    assert (code, len(problems)) == (2, 1), problems
    assert problems[0][0] == names(name, "takes", path)


@pytest.mark.parametrize(
    "name",
    [name for name, setting in SETTINGS.items() if name != "config" and (setting.type_name in ON_COMMAND_LINES or setting.choices)],
)  # fmt: skip
def test_on_the_command_line(refuse, name):
    setting = SETTINGS[name]
    wrong = "other" if setting.choices else ON_COMMAND_LINES[setting.type_name]
    code, problems = refuse(f"--{name}", wrong)
    assert (code, len(problems)) == (2, 1), problems
    assert problems[0][0] == names(name, "takes", f"--{name}")


@pytest.mark.parametrize("name", ["model_paths", "trainable_models", "lora_base_model"])
def test_what_lacks_a_value_that_was_wrong_is_not_told_besides(refuse, config, name):
    """Without a recipe the default has no model, or nothing to train."""
    from tests.conftest import ENTRIES

    values = {"lora_base_model": "dit", name: {"a": 1}}
    if name != "model_paths":
        values["model_id_with_origin_paths"] = ",".join(ENTRIES.values())
    if name == "trainable_models":
        del values["lora_base_model"]
    code, problems = refuse("--config", config(json.dumps({"parameters": values})), recipe=None)
    assert (code, len(problems)) == (2, 1), problems


def test_other_problems_are_still_told(refuse):
    code, problems = refuse("--lora_rank", "many", "--lora_target_modules", "to_qq")
    assert code == 2
    assert [message.partition(" ")[0] for message, _ in problems] == ["`lora_rank`", "`lora_target_modules`:"]


@pytest.mark.parametrize("flag", ["--recipe", "--config"])
def test_what_a_recipe_would_have_brought_is_not_missing_besides(refuse, flag):
    code, problems = refuse(flag, "", recipe=None)
    assert (code, len(problems)) == (2, 1), problems


def test_the_dataset_is_not_looked_for_where_its_folder_is_wrong(refuse):
    code, problems = refuse("--dataset_base_path", "")
    assert (code, [message.partition(",")[0] for message, _ in problems]) == (2, [names("dataset_base_path", "a path")])

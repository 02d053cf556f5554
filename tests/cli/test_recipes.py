"""`diffsynth recipe` and precedence: recipes are trained as displayed, with the documented values."""

import json
import shlex

import pytest
import yaml

from diffsynth_core.config.documents import command_line, shown_values
from diffsynth_core.config.parameters import ALIASES, SETTINGS
from diffsynth_core.config.recipes import NOT_IN_RECIPES, recipe_names
from tests.documented_recipes import DEFAULTS, FAMILIES, PRESETS, REFERENCE, STAGED
from tests.naming import names

OWN = {
    "shapes-full": {
        "batch_size": 64,
        "caption_dropout": 0.1,
        "max_grad_norm": 1.0,
        "adam_betas": [0.9, 0.99],
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 100,
    },
    "shapes-lora": {"batch_size": 24, "lr_scheduler": "cosine", "lr_warmup_steps": 20},
    **{
        preset: {name: value for name, value in parameters.items() if name not in DEFAULTS}
        for preset, parameters in PRESETS.items()
    },
}
"""Recipes that DiffSynth-Studio does not have, and what they set that its documentation does not have either."""


def show(cli, name: str, output_format: str) -> str:
    outcome = cli("recipe", "show", name, "--format", output_format)
    assert (outcome.code, outcome.err) == (0, "")
    return outcome.out


def words_of(text: str) -> list[str]:
    """Return the arguments after `diffsynth train` in a multi-line command, as a shell parses them."""
    program, command, *words = shlex.split(text.replace("\\\n", " "))
    assert (program, command) == ("diffsynth", "train")
    return words


def test_the_list_for_people(cli):
    outcome = cli("recipe", "list")
    lines = outcome.out.splitlines()
    assert (outcome.code, outcome.err) == (0, "")
    assert [line.split()[0] for line in lines] == sorted(recipe_names())
    assert REFERENCE.keys() | STAGED.keys() | {*OWN} == set(recipe_names())
    assert len({line.rindex("  ") for line in lines}) == 1, "the columns are not aligned"
    assert any(line.split(maxsplit=1) == ["qwen-image-lora", "LoRA on Qwen-Image"] for line in lines)


def test_the_list_for_programs(cli):
    outcome = cli("recipe", "list", "--format", "json")
    recipes = json.loads(outcome.out)
    assert (outcome.code, outcome.err) == (0, "")
    assert [recipe["name"] for recipe in recipes] == sorted(recipe_names())
    assert {"name": "qwen-image-lora", "family": "qwen-image", "description": "LoRA on Qwen-Image"} in recipes


@pytest.mark.parametrize("name", REFERENCE)
def test_values_are_those_of_the_documentation(cli, name):
    content = json.loads(show(cli, name, "json"))
    assert content["parameters"] == {**DEFAULTS, "output_path": f"models/train/{name}", **REFERENCE[name]}
    family = next(family for begin, family in FAMILIES.items() if name.startswith(begin))
    assert (content["name"], content["family"]) == (name, family)


@pytest.mark.parametrize("name", STAGED)
def test_values_of_stages_are_those_of_the_documentation(cli, name):
    content = json.loads(show(cli, name, "json"))
    assert content.keys() == {"name", "description", "family", "stages"} and content["family"] == "wan"
    assert list(content["stages"]) == list(STAGED[name])
    for stage, values in STAGED[name].items():
        shown = content["stages"][stage]
        assert shown["description"] == f"The {stage}-noise expert"
        assert shown["parameters"] == {**DEFAULTS, "output_path": f"models/train/{name}/{stage}", **values}


@pytest.mark.parametrize("name", recipe_names())
def test_exactly_the_documented_names_are_shown(cli, name):
    for content in (json.loads(show(cli, name, "json")), yaml.safe_load(show(cli, name, "yaml"))):
        for part in content.get("stages", {"": content}).values():
            assert part["parameters"].keys() == DEFAULTS.keys() | OWN.get(name, {}).keys()


@pytest.mark.parametrize(("name", "own"), OWN.items())
def test_what_a_recipe_sets_beyond_the_documentation_is_shown(cli, name, own):
    assert json.loads(show(cli, name, "json"))["parameters"].items() >= own.items()


@pytest.mark.parametrize("name", recipe_names())
def test_the_yaml_is_a_config_of_the_same_runs(cli, parse_stages, config, name):
    text = show(cli, name, "yaml")
    assert text.startswith(f"# {name}\n")
    found, originals = parse_stages("--config", config(text)), parse_stages("--recipe", name)
    for resolved, original in zip(found, originals, strict=True):
        assert resolved.problems == ()
        assert shown_values(resolved.parameters) == shown_values(original.parameters)
        assert (resolved.family, resolved.stage) == (original.family, original.stage)


@pytest.mark.parametrize("name", recipe_names())
def test_the_flags_are_command_lines_of_the_same_runs(cli, parse, parse_stages, name):
    text = show(cli, name, "flags")
    commands = ["diffsynth train" + part for part in text.split("diffsynth train")[1:]]
    originals = parse_stages("--recipe", name)
    for command, original in zip(commands, originals, strict=True):
        resolved = parse(*words_of(command.partition("\n#")[0]))
        assert resolved.problems == ()
        assert shown_values(resolved.parameters) == shown_values(original.parameters)


@pytest.mark.parametrize("name", recipe_names())
def test_the_flags_of_a_stage_stand_below_its_name(cli, name):
    lines = show(cli, name, "flags").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("diffsynth train")]
    above = [lines[number - 1] for number in starts if number]
    stages = STAGED.get(name, {})
    assert above == [f"# {stage}: The {stage}-noise expert" for stage in stages]
    assert [line for line in lines if line.startswith("#")] == above and len(starts) == max(1, len(stages))


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 1.23456789e-4, "weight_decay": 1 / 3},
        {"seed": 2**63 - 1, "max_timestep_boundary": 0.358},
        {"dataset_base_path": "my images/it's $HOME", "remove_prefix_in_ckpt": ""},
        {"model_paths": ["a b.safetensors", ["c-1.safetensors", "c-2.safetensors"]]},
        {"lora_target_modules": [], "trainable_models": ["dit", "vae"], "data_file_keys": ["image"]},
        {"use_gradient_checkpointing": True, "find_unused_parameters": False, "save_steps": None},
    ],
)
def test_a_command_line_gives_the_values_it_was_made_from(parse, values):
    parameters = parse(*words_of(command_line(values))).parameters.model_dump(mode="json")
    assert {name: parameters[name] for name in values} == values


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("qwen-image-lorra", names("qwen-image-lora")),
        ("zzz", names("diffsynth recipe list")),
        ("../recipes/qwen-image-lora", names("qwen-image-lora")),
    ],
)
def test_unknown_recipe(says, cli, name, hint):
    outcome = cli("recipe", "show", name)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == names("error:", "no recipe", name) and outcome.err == names("hint:", hint)
    says(outcome)


def test_the_schema_knows_every_parameter_of_a_file(cli):
    schema = json.loads(cli("recipe", "schema").out)
    parameters = schema["properties"]["parameters"]
    assert schema["properties"].keys() == {"extends", "description", "family", "parameters", "stages"}
    assert parameters["properties"].keys() == (SETTINGS.keys() | ALIASES.keys()) - NOT_IN_RECIPES
    assert parameters["additionalProperties"] is False and schema["additionalProperties"] is False


def test_flags_go_before_config_before_recipe_before_default(parse, config):
    path = config("parameters:\n  learning_rate: 3e-5\n  lora_target_modules: [to_q]\n  output_path: mine\n")
    recipe = ("--recipe", "qwen-image-full")
    assert parse().parameters.learning_rate == 1e-4
    assert parse(*recipe).parameters.learning_rate == 1e-5
    assert parse("--config", path).parameters.learning_rate == 3e-5
    assert parse(*recipe, "--config", path).parameters.learning_rate == 3e-5
    assert parse("--learning_rate", "7e-5", "--config", path, *recipe).parameters.learning_rate == 7e-5
    both = parse(*recipe, "--config", path)
    assert both.parameters.num_epochs == 2, "the recipe's own value stays"
    assert both.parameters.lora_target_modules == ("to_q",), "lists are replaced, not joined"
    assert str(both.parameters.output_path) == "mine"
    assert str(both.origin("learning_rate")) == f"`{path}`"


def test_a_config_can_extend_a_recipe(parse, config):
    path = config("extends: qwen-image-2512-lora\nparameters:\n  lora_rank: 8\n")
    resolved = parse("--config", path)
    assert resolved.problems == () and resolved.family == "qwen-image"
    output_path = "models/train/config"
    expected = {**DEFAULTS, **REFERENCE["qwen-image-2512-lora"], "lora_rank": 8, "output_path": output_path}
    assert shown_values(resolved.parameters) == expected


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        *(("learning_rate", text, 1e-4) for text in ("1e-4", "1E-4", "1.e-4", "1.0e-4", "+1e-4", "'1e-4'", ".0001")),
        ("weight_decay", "1e+2", 100.0),
        ("lora_rank", "010", 10),
        ("mixed_precision", "no", "no"),
        ("use_gradient_checkpointing", "true", True),
        ("trainable_models", "dit, vae", ("dit", "vae")),
        ("trainable_models", "[dit, vae]", ("dit", "vae")),
        ("model_paths", "[a, [b, c]]", (("a",), ("b", "c"))),
    ],
)
def test_yaml_is_read_as_people_write_it(parse, config, name, text, value):
    resolved = parse("--config", config(f"parameters:\n  {name}: {text}\n"))
    assert getattr(resolved.parameters, name) == value
    assert resolved.invalid == frozenset()


def test_1e_4_in_yaml_is_a_number(refuse, config):
    """Where a string is expected, the report shows the value as parsed."""
    path = config("parameters:\n  lora_base_model: 1e-4\n")
    assert refuse("--config", path) == (2, [(names("lora_base_model", "a string", "0.0001", path), None)])

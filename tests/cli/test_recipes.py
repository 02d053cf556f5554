"""`diffsynth recipe` and the order of precedence: what is shown is what is trained, with the documented values."""

import json
import shlex

import pytest
import yaml

from diffsynth_core.config.documents import command_line, documented_values
from diffsynth_core.config.parameters import SETTINGS
from diffsynth_core.config.recipes import NOT_IN_RECIPES, recipe_names

DEFAULTS = {
    "dataset_base_path": "data/example_image_dataset",
    "dataset_metadata_path": None,
    "dataset_repeat": 1,
    "dataset_num_workers": 0,
    "data_file_keys": ["image", "video"],
    "height": None,
    "width": None,
    "max_pixels": 1048576,
    "num_frames": 81,
    "model_paths": [],
    "model_id_with_origin_paths": [],
    "extra_inputs": [],
    "fp8_models": [],
    "offload_models": [],
    "learning_rate": 1e-4,
    "num_epochs": 1,
    "trainable_models": [],
    "find_unused_parameters": False,
    "weight_decay": 0.01,
    "task": "sft",
    "lora_base_model": None,
    "lora_target_modules": None,
    "lora_rank": 32,
    "lora_checkpoint": None,
    "preset_lora_path": None,
    "preset_lora_model": None,
    "use_gradient_checkpointing": False,
    "use_gradient_checkpointing_offload": False,
    "gradient_accumulation_steps": 1,
    "output_path": "models",
    "remove_prefix_in_ckpt": "pipe.dit.",
    "save_steps": None,
    "max_timestep_boundary": 1.0,
    "min_timestep_boundary": 0.0,
    "tokenizer_path": None,
    "processor_path": None,
    "tokenizer_1_path": None,
    "tokenizer_2_path": None,
    "align_to_opensource_format": False,
    "initialize_model_on_cpu": False,
    "zero_cond_t": False,
}
"""The documented names and their defaults."""
SHARED = {
    "dataset_repeat": 50,
    "max_pixels": 1048576,
    "find_unused_parameters": True,
    "use_gradient_checkpointing": True,
}
LORA = {
    **SHARED,
    "dataset_num_workers": 8,
    "learning_rate": 1e-4,
    "num_epochs": 5,
    "lora_base_model": "dit",
    "lora_target_modules": [
        *("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"),
        *("img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1"),
    ],
    "lora_rank": 32,
}
FULL = {**SHARED, "learning_rate": 1e-5, "num_epochs": 2, "trainable_models": ["dit"]}
ENCODERS = [
    "Qwen/Qwen-Image:text_encoder/model*.safetensors",
    "Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors",
]
TRANSFORMER = "transformer/diffusion_pytorch_model*.safetensors"
REFERENCE = {
    "qwen-image-lora": {**LORA, "model_id_with_origin_paths": [f"Qwen/Qwen-Image:{TRANSFORMER}", *ENCODERS]},
    "qwen-image-full": {**FULL, "model_id_with_origin_paths": [f"Qwen/Qwen-Image:{TRANSFORMER}", *ENCODERS]},
    "qwen-image-2512-lora": {**LORA, "model_id_with_origin_paths": [f"Qwen/Qwen-Image-2512:{TRANSFORMER}", *ENCODERS]},
    "qwen-image-2512-full": {**FULL, "model_id_with_origin_paths": [f"Qwen/Qwen-Image-2512:{TRANSFORMER}", *ENCODERS]},
}
"""What the documented training scripts of these models say; what they leave out is at its default."""


def show(cli, name: str, output_format: str) -> str:
    outcome = cli("recipe", "show", name, "--format", output_format)
    assert (outcome.code, outcome.err) == (0, "")
    return outcome.out


def words_of(text: str) -> list[str]:
    """The arguments behind `diffsynth train` in a command line of several lines, as a shell reads them."""
    program, command, *words = shlex.split(text.replace("\\\n", " "))
    assert (program, command) == ("diffsynth", "train")
    return words


def test_the_list_for_people(cli):
    outcome = cli("recipe", "list")
    lines = outcome.out.splitlines()
    assert (outcome.code, outcome.err) == (0, "")
    assert [line.split()[0] for line in lines] == sorted(recipe_names())
    assert set(REFERENCE) <= set(recipe_names())
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
    assert (content["name"], content["family"]) == (name, "qwen-image")


@pytest.mark.parametrize("name", recipe_names())
def test_exactly_the_documented_names_are_shown(cli, name):
    assert json.loads(show(cli, name, "json"))["parameters"].keys() == DEFAULTS.keys()
    assert yaml.safe_load(show(cli, name, "yaml"))["parameters"].keys() == DEFAULTS.keys()


@pytest.mark.parametrize("name", recipe_names())
def test_the_yaml_is_a_config_of_the_same_run(cli, parse, config, name):
    text = show(cli, name, "yaml")
    assert text.startswith(f"# {name}\n")
    resolved, original = parse("--config", config(text)), parse("--recipe", name)
    assert resolved.problems == ()
    assert documented_values(resolved.parameters) == documented_values(original.parameters)
    assert resolved.family == original.family


@pytest.mark.parametrize("name", recipe_names())
def test_the_flags_are_a_command_line_of_the_same_run(cli, parse, name):
    resolved = parse(*words_of(show(cli, name, "flags")))
    assert resolved.problems == ()
    assert documented_values(resolved.parameters) == json.loads(show(cli, name, "json"))["parameters"]


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 1.23456789e-4, "weight_decay": 1 / 3},
        {"seed": 2**63 - 1, "max_timestep_boundary": 0.358},
        {"dataset_base_path": "my pictures/it's $HOME", "remove_prefix_in_ckpt": ""},
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
        ("qwen-image-lorra", "did you mean `qwen-image-lora`?"),
        ("zzz", "`diffsynth recipe list` names them all"),
        ("../recipes/qwen-image-lora", "did you mean `qwen-image-lora`?"),
    ],
)
def test_unknown_recipe(cli, name, hint):
    outcome = cli("recipe", "show", name)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"error: there is no recipe `{name}`\n  hint: {hint}\n"


def test_the_schema_knows_every_parameter_of_a_file(cli):
    schema = json.loads(cli("recipe", "schema").out)
    parameters = schema["properties"]["parameters"]
    assert schema["properties"].keys() == {"extends", "description", "family", "parameters"}
    assert parameters["properties"].keys() == SETTINGS.keys() - NOT_IN_RECIPES
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
    assert both.origins["learning_rate"] == f"`{path}`"


def test_a_config_can_extend_a_recipe(parse, config):
    path = config("extends: qwen-image-2512-lora\nparameters:\n  lora_rank: 8\n")
    resolved = parse("--config", path)
    assert resolved.problems == () and resolved.family == "qwen-image"
    output_path = "models/train/config"
    expected = {**DEFAULTS, **REFERENCE["qwen-image-2512-lora"], "lora_rank": 8, "output_path": output_path}
    assert documented_values(resolved.parameters) == expected


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
    """Where a text is expected the report shows what it was read as."""
    path = config("parameters:\n  lora_base_model: 1e-4\n")
    assert refuse("--config", path) == (2, [(f"`lora_base_model` takes a text, got `0.0001` (`{path}`)", None)])

"""Wrong use of `diffsynth train`: each mistake is reported with a hint before anything is done."""

import pytest

from diffsynth_core.config.gpu_memory import MEMORY_WORDS
from tests.conftest import ENTRIES
from tests.naming import names

MODELS = (
    "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors,"
    "Qwen/Qwen-Image:text_encoder/model*.safetensors,Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors"
)
HELP_LISTS = names("diffsynth train --help")
RECIPES_LISTED = names("diffsynth recipe list")
COMPONENTS = names("Qwen-Image", "dit", "text_encoder", "vae", "controlnet")
TARGETS = names(
    "to_q",
    "to_k",
    "to_v",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_out.0",
    "to_add_out",
    "img_mlp.net.2",
    "img_mod.1",
    "txt_mlp.net.2",
    "txt_mod.1",
)


@pytest.mark.parametrize(
    ("arguments", "name", "hint"),
    [
        (["--lora_rnk", 16], "lora_rnk", names("lora_rank")),
        (["--lora-rnk=16"], "lora-rnk", names("lora_rank")),
        (["--no-dataset_repeet"], "no-dataset_repeet", names("dataset_repeat")),
        (["--xyzzy"], "xyzzy", HELP_LISTS),
    ],
)
def test_unknown_flag(refuse, arguments, name, hint):
    assert refuse(*arguments) == (2, [(names(name, "not a parameter"), hint)])


def test_unknown_parameter_in_a_config(refuse, config):
    path = config("parameters:\n  lora_rnk: 16\n  xyzzy: 1\n")
    assert refuse("--config", path) == (
        2,
        [
            (names("lora_rnk", path, "not a parameter"), names("lora_rank")),
            (names("xyzzy", path, "not a parameter"), HELP_LISTS),
        ],
    )


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("lora_rank", "abc", "an integer"),
        ("lora_rank", "1.5", "an integer"),
        ("lora_rank", "", "an integer"),
        ("lora_rank", "0", names("an integer", "at least", 1)),
        ("height", "8", names("an integer", "at least", 16)),
        ("seed", "9223372036854775808", names("an integer", "at most", 9223372036854775807)),
        ("learning_rate", "fast", "a number"),
        ("learning_rate", "nan", "a number"),
        ("learning_rate", "-1", names("a number", "at least", "0.0")),
        ("max_grad_norm", "0", names("a number", "more than", 0)),
        ("gpu_memory", "0GB", MEMORY_WORDS),
        ("gpu_memory", "-1GB", MEMORY_WORDS),
        ("mixed_precision", "fp8", "one of no, bf16, fp16"),
        ("model_paths", "vae.safetensors", "a JSON list of paths"),
        ("model_paths", "[1]", "a JSON list of paths"),
    ],
)
def test_wrong_value_on_the_command_line(refuse, flag, value, expected):
    message = names(flag, expected, value, f"--{flag}")
    assert refuse(f"--{flag}", value) == (2, [(message, None)])


@pytest.mark.parametrize(
    ("flag", "value", "near"), [("lr_scheduler", "cosin", "cosine"), ("task", "stf", "sft"), ("resume", "Auto", "auto")]
)
def test_a_misspelled_choice(refuse, flag, value, near):
    code, [(message, hint)] = refuse(f"--{flag}", value)
    assert (code, hint) == (2, names(near))
    assert message == names(flag, "takes one of", value, f"--{flag}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lora_rank: true", names("lora_rank", "an integer", "true")),
        ("learning_rate: false", names("learning_rate", "a number", "false")),
        ("learning_rate: .nan", names("learning_rate", "a number", "NaN")),
        ("lora_rank: abc", names("lora_rank", "an integer", "abc")),
        ("lora_rank: [3]", names("lora_rank", "an integer", "[3]")),
        ("lora_rank:", names("lora_rank", "an integer", "null")),
        ("use_gradient_checkpointing: maybe", names("use_gradient_checkpointing", "true or false", "maybe")),
        ("lora_base_model: 3", names("lora_base_model", "a string", 3)),
        ("output_path: 3", names("output_path", "a path", 3)),
        ("trainable_models: {dit: 1}", names("trainable_models", '{"dit": 1}')),
    ],
)
def test_wrong_value_in_a_config(refuse, config, line, message):
    path = config(f"parameters:\n  {line}\n")
    assert refuse("--config", path) == (2, [(names(message, path), None)])


def test_a_flag_is_not_taken_for_the_value_of_another(refuse):
    code, problems = refuse("--output_path", "--rehearse")
    assert code == 2
    assert problems[0][0] == names("output_path", "a path", "--rehearse")


@pytest.mark.parametrize("flag", ["output_path", "dataset_base_path", "config"])
def test_an_empty_value_is_not_passed_over(refuse, flag):
    """A shell script whose variable is not set must not train into the current folder."""
    code, problems = refuse(f"--{flag}", "")
    assert code == 2
    assert problems[0][0] == names(flag, "a path", "``")


@pytest.mark.parametrize(("name", "hint"), [("qwen-image-lorra", names("qwen-image-lora")), ("zzz", RECIPES_LISTED)])
def test_unknown_recipe(refuse, name, hint):
    assert refuse(recipe=name) == (2, [(names("no recipe", name), hint)])


def test_a_file_given_as_a_recipe(refuse, config):
    path = config("extends: qwen-image-lora\n")
    hint = names(f"--config {path}")
    assert refuse(recipe=str(path)) == (2, [(names("no recipe", path), hint)])


def test_a_recipe_given_as_a_file(refuse):
    message = names("--config", "qwen-image-lora", "is a recipe")
    expected = (2, [(message, names("--recipe qwen-image-lora"))])
    assert refuse("--config", "qwen-image-lora", recipe=None) == expected


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (
            "parametres: {}",
            names("{path}", "parametres", "not a key"),
            names("extends, description, family, parameters, stages"),
        ),
        ("lora_rank: 3", names("{path}", "lora_rank", "not a key"), names("parameters:")),
        ("extends: qwen-image-lorra", names("{path}", "qwen-image-lorra", "not a recipe"), names("qwen-image-lora")),
        ("extends: ./zzz.yaml", names("{path}", "./zzz.yaml", "not a recipe"), RECIPES_LISTED),
        ("# nothing yet", names("{path}", "is empty"), names("parameters:")),
        ("family: qwen-imag", names("unknown family", "qwen-imag", "{path}"), names("qwen-image")),
        ("parameters:\n  resume: auto", names("resume", "{path}", "single command"), "pass it as a flag"),
    ],
)
def test_wrong_key_or_name_in_a_recipe_file(refuse, config, text, message, hint):
    path = config(text)
    assert refuse("--config", path) == (2, [(message.format(path=path), hint)])


@pytest.mark.parametrize(
    "text",
    [
        "parameters:\n  seed: [1\n",
        "\tseed: 1\n",
        "parameters:\n  seed: 1\n  seed: 2\n",
        'description: "\x07"\n',
        "? [a]\n: 3\n",
        "seed: !!python/name:os.system\n",
    ],
)
def test_a_config_that_is_not_yaml(refuse, config, text):
    path = config(text)
    code, [(message, _)] = refuse("--config", path)
    assert code == 1
    assert message == names(path, "not valid YAML")


def test_a_config_that_is_not_there(refuse):
    code, [(message, _)] = refuse("--config", "nowhere.yaml")
    assert code == 1
    assert message == names("cannot read", "nowhere.yaml") and "Errno" not in message


@pytest.mark.parametrize(("given", "missing"), [("height", "width"), ("width", "height")])
def test_one_side_without_the_other(refuse, given, missing):
    hint = names(f"--{missing}")
    assert refuse(f"--{given}", 128) == (2, [(names(given, "without", missing), hint)])


def test_a_fixed_side_that_is_no_multiple_of_16(refuse):
    assert refuse("--height", 130, "--width", 24) == (
        2,
        [
            (names("height", 130, "not a multiple", 16, "Qwen-Image"), names("--height 128")),
            (names("width", 24, "not a multiple", 16, "Qwen-Image"), names("--width 16")),
        ],
    )


def test_fp16_on_a_cpu(refuse):
    assert refuse("--mixed_precision", "fp16") == (
        2,
        [(names("mixed_precision", "fp16", "needs a GPU"), names("--mixed_precision bf16", "no"))],
    )


def test_nothing_to_train(refuse):
    assert refuse("--model_id_with_origin_paths", MODELS, recipe=None) == (
        2,
        [("nothing to train", names("--lora_base_model dit", "--trainable_models dit"))],
    )


def test_no_model(refuse):
    assert refuse(recipe=None) == (
        2,
        [("no model files given", names("--recipe", "--model_paths", "--model_id_with_origin_paths"))],
    )


def test_a_parameter_of_another_family(refuse):
    """The family is that of the recipe, or of the files if there is no recipe."""
    refusal = 2, [(names("num_frames", "not apply", "qwen-image", "wan", "--num_frames"), "remove it")]
    assert refuse("--num_frames", 5) == refusal
    files = ("--model_id_with_origin_paths", ",".join(ENTRIES.values()), "--lora_base_model", "dit")
    assert refuse("--num_frames", 5, *files, recipe=None) == refusal


@pytest.mark.parametrize("parameter", ["lora_base_model", "trainable_models"])
@pytest.mark.parametrize(
    ("name", "hint"), [("text_encodr", names("text_encoder")), ("dit2", names("dit")), ("unet", COMPONENTS)]
)
def test_a_component_that_is_not_there(refuse, parameter, name, hint):
    message = names(parameter, name, "not a component", "Qwen-Image")
    assert refuse(f"--{parameter}", name) == (2, [(message, hint)])


def test_target_modules_that_match_nothing(refuse):
    assert refuse("--lora_target_modules", "to_qq,to_k,xyzzy") == (
        2,
        [
            (names("lora_target_modules", "no module", "dit", "to_qq"), names("to_q")),
            (names("lora_target_modules", "no module", "dit", "xyzzy"), TARGETS),
        ],
    )


@pytest.mark.parametrize(
    ("variable", "engine"),
    [("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"), ("ACCELERATE_USE_FSDP", "version 1 of FSDP")],
)
def test_engines_that_do_not_exist_here_are_refused(refuse, monkeypatch, variable, engine):
    monkeypatch.setenv(variable, "true")
    assert refuse() == (2, [(names(engine), names("--accelerate_config"))])

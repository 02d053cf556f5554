"""Wrong use of `diffsynth train`: each mistake is reported with a hint before anything is done."""

import pytest

from diffsynth_core.config.gpu_memory import MEMORY_WORDS
from tests.conftest import ENTRIES

MODELS = (
    "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors,"
    "Qwen/Qwen-Image:text_encoder/model*.safetensors,Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors"
)
HELP_LISTS = "see `diffsynth train --help`"
RECIPES_LISTED = "see `diffsynth recipe list`"
COMPONENTS = "components of Qwen-Image: dit, text_encoder, vae, controlnet"
TARGETS = (
    "the documented targets are to_q, to_k, to_v, add_q_proj, add_k_proj, add_v_proj, to_out.0, to_add_out, "
    "img_mlp.net.2, img_mod.1, txt_mlp.net.2, txt_mod.1"
)


@pytest.mark.parametrize(
    ("arguments", "name", "hint"),
    [
        (["--lora_rnk", 16], "lora_rnk", "did you mean `lora_rank`?"),
        (["--lora-rnk=16"], "lora-rnk", "did you mean `lora_rank`?"),
        (["--no-dataset_repeet"], "no-dataset_repeet", "did you mean `dataset_repeat`?"),
        (["--xyzzy"], "xyzzy", HELP_LISTS),
    ],
)
def test_unknown_flag(refuse, arguments, name, hint):
    assert refuse(*arguments) == (2, [(f"`{name}` (command line) is not a parameter", hint)])


def test_unknown_parameter_in_a_config(refuse, config):
    path = config("parameters:\n  lora_rnk: 16\n  xyzzy: 1\n")
    assert refuse("--config", path) == (
        2,
        [
            (f"`lora_rnk` in `{path}` is not a parameter", "did you mean `lora_rank`?"),
            (f"`xyzzy` in `{path}` is not a parameter", HELP_LISTS),
        ],
    )


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("lora_rank", "abc", "an integer"),
        ("lora_rank", "1.5", "an integer"),
        ("lora_rank", "", "an integer"),
        ("lora_rank", "0", "an integer of at least 1"),
        ("height", "8", "an integer of at least 16"),
        ("seed", "9223372036854775808", "an integer of at most 9223372036854775807"),
        ("learning_rate", "fast", "a number"),
        ("learning_rate", "nan", "a number"),
        ("learning_rate", "-1", "a number of at least 0.0"),
        ("max_grad_norm", "0", "a number of more than 0"),
        ("gpu_memory", "0GB", MEMORY_WORDS),
        ("gpu_memory", "-1GB", MEMORY_WORDS),
        ("mixed_precision", "fp8", "one of no, bf16, fp16"),
        ("model_paths", "vae.safetensors", "a JSON list of paths, or of lists of shard paths"),
        ("model_paths", "[1]", "a JSON list of paths, or of lists of shard paths"),
    ],
)
def test_wrong_value_on_the_command_line(refuse, flag, value, expected):
    message = f"`{flag}` takes {expected}, got `{value}` (`--{flag}`)"
    assert refuse(f"--{flag}", value) == (2, [(message, None)])


@pytest.mark.parametrize(
    ("flag", "value", "near"), [("lr_scheduler", "cosin", "cosine"), ("task", "stf", "sft"), ("resume", "Auto", "auto")]
)
def test_a_misspelt_choice(refuse, flag, value, near):
    code, [(message, hint)] = refuse(f"--{flag}", value)
    assert (code, hint) == (2, f"did you mean `{near}`?")
    assert message.startswith(f"`{flag}` takes one of ") and message.endswith(f", got `{value}` (`--{flag}`)")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lora_rank: true", "`lora_rank` takes an integer, got `true`"),
        ("learning_rate: false", "`learning_rate` takes a number, got `false`"),
        ("learning_rate: .nan", "`learning_rate` takes a number, got `NaN`"),
        ("lora_rank: abc", "`lora_rank` takes an integer, got `abc`"),
        ("lora_rank: [3]", "`lora_rank` takes an integer, got `[3]`"),
        ("lora_rank:", "`lora_rank` takes an integer, got `null`"),
        ("use_gradient_checkpointing: maybe", "`use_gradient_checkpointing` takes true or false, got `maybe`"),
        ("lora_base_model: 3", "`lora_base_model` takes a string, got `3`"),
        ("output_path: 3", "`output_path` takes a path, got `3`"),
        (
            "trainable_models: {dit: 1}",
            '`trainable_models` takes a comma-separated list of strings, got `{"dit": 1}`',
        ),
    ],
)
def test_wrong_value_in_a_config(refuse, config, line, message):
    path = config(f"parameters:\n  {line}\n")
    assert refuse("--config", path) == (2, [(f"{message} (`{path}`)", None)])


def test_a_flag_is_not_taken_for_the_value_of_another(refuse):
    code, problems = refuse("--output_path", "--rehearse")
    assert code == 2
    assert problems[0][0].startswith("`output_path` takes a path, got `--rehearse`")


@pytest.mark.parametrize("flag", ["output_path", "dataset_base_path", "config"])
def test_an_empty_value_is_not_passed_over(refuse, flag):
    """A shell script whose variable is not set must not train into the current folder."""
    code, problems = refuse(f"--{flag}", "")
    assert code == 2
    assert problems[0][0].startswith(f"`{flag}` takes a path, got ``")


@pytest.mark.parametrize(
    ("name", "hint"), [("qwen-image-lorra", "did you mean `qwen-image-lora`?"), ("zzz", RECIPES_LISTED)]
)
def test_unknown_recipe(refuse, name, hint):
    assert refuse(recipe=name) == (2, [(f"there is no recipe `{name}`", hint)])


def test_a_file_given_as_a_recipe(refuse, config):
    path = config("extends: qwen-image-lora\n")
    hint = f"pass your own file as `--config {path}`"
    assert refuse(recipe=str(path)) == (2, [(f"there is no recipe `{path}`", hint)])


def test_a_recipe_given_as_a_file(refuse):
    message = "`--config` takes a file, but `qwen-image-lora` is a recipe"
    expected = (2, [(message, "pass `--recipe qwen-image-lora`")])
    assert refuse("--config", "qwen-image-lora", recipe=None) == expected


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (
            "parametres: {}",
            "`{path}`: `parametres` is not a key of a recipe",
            "a recipe has the keys extends, description, family, parameters, stages",
        ),
        ("lora_rank: 3", "`{path}`: `lora_rank` is not a key of a recipe", "move it below `parameters:`"),
        (
            "extends: qwen-image-lorra",
            "`{path}` extends `qwen-image-lorra`, which is not a recipe; only recipes can be extended",
            "did you mean `qwen-image-lora`?",
        ),
        (
            "extends: ./zzz.yaml",
            "`{path}` extends `./zzz.yaml`, which is not a recipe; only recipes can be extended",
            RECIPES_LISTED,
        ),
        ("# nothing yet", "`{path}` is empty", "add `parameters:` with the values below it"),
        ("family: qwen-imag", "unknown family `qwen-imag`", "did you mean `qwen-image`?"),
        (
            "parameters:\n  resume: auto",
            "`resume` in `{path}` applies to a single command and cannot be set in a file",
            "pass it as a flag",
        ),
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
    assert message.startswith(f"`{path}` is not valid YAML")


def test_a_config_that_is_not_there(refuse):
    code, [(message, _)] = refuse("--config", "nowhere.yaml")
    assert code == 1
    assert message.startswith("cannot read `nowhere.yaml`") and "Errno" not in message


@pytest.mark.parametrize(("given", "missing"), [("height", "width"), ("width", "height")])
def test_one_side_without_the_other(refuse, given, missing):
    hint = f"set `--{missing}` too, or neither for dynamic resolution"
    assert refuse(f"--{given}", 128) == (2, [(f"`{given}` is set without `{missing}`", hint)])


def test_a_fixed_side_that_is_no_multiple_of_16(refuse):
    assert refuse("--height", 130, "--width", 24) == (
        2,
        [
            ("`height` 130 is not a multiple of 16, which Qwen-Image requires", "pass `--height 128`"),
            ("`width` 24 is not a multiple of 16, which Qwen-Image requires", "pass `--width 16`"),
        ],
    )


def test_fp16_on_a_cpu(refuse):
    assert refuse("--mixed_precision", "fp16") == (
        2,
        [
            (
                "`mixed_precision` `fp16` needs a GPU; the device is cpu",
                "pass `--mixed_precision bf16` or `no`",
            )
        ],
    )


def test_nothing_to_train(refuse):
    assert refuse("--model_id_with_origin_paths", MODELS, recipe=None) == (
        2,
        [
            (
                "nothing to train",
                "pass `--lora_base_model dit` for a LoRA, or `--trainable_models dit` for full training",
            )
        ],
    )


def test_no_model(refuse):
    assert refuse(recipe=None) == (
        2,
        [("no model files given", "pass `--recipe`, `--model_paths` or `--model_id_with_origin_paths`")],
    )


def test_a_parameter_of_another_family(refuse):
    """The family is that of the recipe, or of the files if there is no recipe."""
    refusal = 2, [("`num_frames` does not apply to qwen-image, only to wan (`--num_frames`)", "remove it")]
    assert refuse("--num_frames", 5) == refusal
    files = ("--model_id_with_origin_paths", ",".join(ENTRIES.values()), "--lora_base_model", "dit")
    assert refuse("--num_frames", 5, *files, recipe=None) == refusal


@pytest.mark.parametrize("parameter", ["lora_base_model", "trainable_models"])
@pytest.mark.parametrize(
    ("name", "hint"),
    [("text_encodr", "did you mean `text_encoder`?"), ("dit2", "did you mean `dit`?"), ("unet", COMPONENTS)],
)
def test_a_component_that_is_not_there(refuse, parameter, name, hint):
    message = f"`{parameter}` names `{name}`, which is not a component of Qwen-Image"
    assert refuse(f"--{parameter}", name) == (2, [(message, hint)])


def test_target_modules_that_match_nothing(refuse):
    assert refuse("--lora_target_modules", "to_qq,to_k,xyzzy") == (
        2,
        [
            ("`lora_target_modules`: no module of dit ends with `to_qq`", "did you mean `to_q`?"),
            ("`lora_target_modules`: no module of dit ends with `xyzzy`", TARGETS),
        ],
    )


@pytest.mark.parametrize(
    ("variable", "engine"), [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")]
)
def test_engines_that_share_weights_out_are_refused(refuse, monkeypatch, variable, engine):
    monkeypatch.setenv(variable, "true")
    assert refuse() == (
        2,
        [
            (
                f"launched with {engine}: sharding is not supported yet",
                "use DDP (`recipes/accelerate/ddp.yaml`), or a single process",
            )
        ],
    )

"""Unknown parameter names: names of other trainers are answered, stray words are suggested a flag."""

import pytest

from diffsynth_core.config.arguments import unknown_arguments
from diffsynth_core.config.parameters import SETTINGS
from diffsynth_core.config.resolve import resolve
from diffsynth_core.config.unknown_names import UNSUPPORTED, find_unsupported
from tests.naming import names

DOCUMENTED = [
    "dataset_base_path", "dataset_metadata_path", "dataset_repeat", "dataset_num_workers",
    "data_file_keys", "model_paths", "model_id_with_origin_paths", "extra_inputs",
    "fp8_models", "quant_options", "offload_models", "learning_rate", "num_epochs",
    "trainable_models", "find_unused_parameters", "weight_decay", "task",
    "output_path", "remove_prefix_in_ckpt", "save_steps", "lora_base_model",
    "lora_target_modules", "lora_rank", "lora_checkpoint", "preset_lora_path",
    "preset_lora_model", "use_gradient_checkpointing", "use_gradient_checkpointing_offload", "gradient_accumulation_steps",
    "height", "width", "max_pixels", "num_frames",
    "max_timestep_boundary", "min_timestep_boundary", "tokenizer_path", "processor_path",
    "align_to_opensource_format", "initialize_model_on_cpu", "tokenizer_1_path", "tokenizer_2_path",
    "zero_cond_t", "enable_tensorboard_log", "enable_swanlab_log", "swanlab_project",
    "enable_wandb_log", "wandb_project", "enable_csv_log",
]  # fmt: skip
"""The documented parameters of DiffSynth-Studio."""
SWITCHES = ["enable_lora_hot_loading", "framewise_decoding"]
WITH_VALUE = [
    "dmd2_student_update_freq", "dmd2_guidance_lora_rank", "embedded_guidance",
    "template_model_id_or_path", "audio_processor_path", "resume_from_checkpoint",
]  # fmt: skip
"""Further options of its trainers with a value, according to their parsers."""
RESUMING = [
    "resume_from_checkpoint",
    "resume_from",
    "load_lora",
    "network_weights",
    "lora_path",
    "pretrained_lora_path",
]
STRAY = names("stray", "not a flag")
HELP = "see `diffsynth train --help`"


def supported_not(name: str) -> names:
    return names(name, "DiffSynth-Studio", "not supported")


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_parameters_are_parameters(name):
    assert name in SETTINGS and not find_unsupported(name)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_a_parameter_is_not_refused(name):
    assert name not in SETTINGS


def messages(*words: str) -> list[str]:
    return [problem.message for problem in unknown_arguments(words)]


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("spell", [str, lambda name: name.replace("_", "-")], ids=["underscores", "dashes"])
def test_a_word_behind_a_switch_is_stray(name, spell):
    flag = f"--{spell(name)}"
    assert messages(flag, flag, "stray") == [*[supported_not(spell(name))] * 2, STRAY]


@pytest.mark.parametrize("name", WITH_VALUE)
@pytest.mark.parametrize("value", ["x", "-1", "0.5"])
def test_a_value_is_no_stray_word(name, value):
    assert messages(f"--{name}", value, f"--{name}={value}", "stray") == [*[supported_not(name)] * 2, STRAY]


def test_no_flag_is_swallowed(refuse):
    words = (
        "--framewise_decoding",
        "--lora_rank",
        0,
        "--audio_processor_path",
        "--save_steps",
        0,
        "--embedded_guidance",
        "x",
    )
    code, problems = refuse(*words)
    assert code == 2
    assert [message for message, _ in problems] == [
        *map(supported_not, ("framewise_decoding", "audio_processor_path", "embedded_guidance")),
        names("lora_rank", "at least 1", 0, "--lora_rank"),
        names("save_steps", "at least 1", 0, "--save_steps"),
    ]


@pytest.mark.parametrize("name", [*SWITCHES, *WITH_VALUE])
def test_a_key_of_a_config_gets_the_same_answer(config, name):
    path = config(f"parameters:\n  {name}: 1\n")
    (problem,) = resolve({"config": path}).problems
    (flag,) = unknown_arguments([f"--{name}"])
    assert problem.message == names(name, path, "DiffSynth-Studio", "not supported")
    assert problem.hint == flag.hint


def test_the_answers(refuse):
    """One of each kind, as prose."""
    asked = tuple(dict.fromkeys((*SWITCHES, *WITH_VALUE, *RESUMING)))
    code, problems = refuse(*(f"--{name}" for name in asked))
    assert code == 2 and [message for message, _ in problems] == [names(name) for name in asked]


@pytest.mark.parametrize("name", RESUMING)
def test_what_other_trainers_resume_with_names_what_does_here(name):
    (problem,) = unknown_arguments([f"--{name}", "models/step-3.safetensors"])
    assert problem.hint == names("--resume auto", "--output_path")
    assert problem.hint == names("--lora_checkpoint FILE")


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("qwen-image-lora", names("--recipe qwen-image-lora")),
        ("qwen-image-lorra", names("--recipe qwen-image-lora")),
        ("mine.yaml", names("--config mine.yaml")),
        ("sub/mine.yml", names("--config sub/mine.yml")),
        ("stray", HELP),
    ],
)
def test_a_word_without_a_flag(refuse, word, hint):
    """Values that the recipe would have provided are not reported as missing."""
    assert refuse(word, recipe=None) == (2, [(names(word, "not a flag"), hint)])


def test_a_folder_without_a_flag(refuse, dataset):
    hint = names(f"--dataset_base_path {dataset}")
    assert refuse(dataset) == (2, [(names(dataset, "not a flag"), hint)])

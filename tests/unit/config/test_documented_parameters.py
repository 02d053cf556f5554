"""Every documented parameter exists exactly once, with its documented group, type and default."""

import pytest

from diffsynth_core.config.parameters import SETTINGS, Parameters, as_plain

DOCUMENTED = [
    ("dataset", "dataset_base_path", "path", "data/example_image_dataset"),
    ("dataset", "dataset_metadata_path", "path", None),
    ("dataset", "dataset_repeat", "int", 1),
    ("dataset", "dataset_num_workers", "int", 0),
    ("dataset", "data_file_keys", "comma list", ["image", "video"]),
    ("model", "model_paths", "json list", []),
    ("model", "model_id_with_origin_paths", "comma list", []),
    ("model", "extra_inputs", "comma list", []),
    ("model", "fp8_models", "comma list", []),
    ("training", "learning_rate", "float", 1e-4),
    ("training", "num_epochs", "int", 1),
    ("training", "trainable_models", "comma list", []),
    ("training", "find_unused_parameters", "bool", False),
    ("training", "weight_decay", "float", 0.01),
    ("training", "enable_optimizer_cpu_offload", "bool", False),
    ("training", "enable_model_cpu_offload", "bool", False),
    ("training", "cpu_offload_split_threshold", "float", None),
    ("training", "task", "choice", "sft"),
    ("output", "output_path", "path", "models"),
    ("output", "remove_prefix_in_ckpt", "str", "pipe.dit."),
    ("output", "save_steps", "int", None),
    ("output", "enable_tensorboard_log", "bool", False),
    ("output", "enable_swanlab_log", "bool", False),
    ("output", "swanlab_project", "str", None),
    ("output", "enable_wandb_log", "bool", False),
    ("output", "wandb_project", "str", None),
    ("output", "enable_csv_log", "bool", False),
    ("lora", "lora_base_model", "str", None),
    ("lora", "lora_target_modules", "comma list", None),
    ("lora", "lora_rank", "int", 32),
    ("lora", "lora_checkpoint", "path", None),
    ("lora", "preset_lora_path", "path", None),
    ("lora", "preset_lora_model", "str", None),
    ("gradient", "use_gradient_checkpointing", "bool", False),
    ("gradient", "use_gradient_checkpointing_offload", "bool", False),
    ("gradient", "gradient_accumulation_steps", "int", 1),
    ("size", "height", "int", None),
    ("size", "width", "int", None),
    ("size", "max_pixels", "int", 1048576),
    ("size", "num_frames", "int", 81),
    ("family", "max_timestep_boundary", "float", 1.0),
    ("family", "min_timestep_boundary", "float", 0.0),
    ("family", "tokenizer_path", "str", None),
    ("family", "processor_path", "str", None),
    ("family", "align_to_opensource_format", "bool", False),
    ("family", "initialize_model_on_cpu", "bool", False),
    ("family", "tokenizer_1_path", "str", None),
    ("family", "tokenizer_2_path", "str", None),
    ("family", "zero_cond_t", "bool", False),
    ("model", "quant_options", "quant options", ""),
    ("model", "offload_models", "comma list", []),
]
TASKS = [
    "sft",
    "sft:data_process",
    "sft:train",
    "direct_distill",
    "direct_distill:data_process",
    "direct_distill:train",
]


def test_all_documented_names_are_there_and_no_other_is_called_documented():
    assert sorted(name for name, setting in SETTINGS.items() if setting.documented) == sorted(
        row[1] for row in DOCUMENTED
    )


@pytest.mark.parametrize(("group", "name", "type_name", "default"), DOCUMENTED)
def test_a_documented_parameter_is_as_documented(group, name, type_name, default):
    setting = SETTINGS[name]
    assert (setting.group, setting.type_name) == (group, type_name)
    found = as_plain(Parameters())[name]
    assert found == default and type(found) is type(default)


def test_all_documented_tasks_are_known():
    assert list(SETTINGS["task"].choices) == TASKS

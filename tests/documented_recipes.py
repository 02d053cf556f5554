"""The values of DiffSynth-Studio's training scripts, by the recipe that must expand to them."""

from diffsynth_core.config.recipes import load_recipe, recipe_names

PRESETS = {
    name: recipe.layers[-1].parameters
    for name in recipe_names()
    if "gpu_memory" in (recipe := load_recipe(name)).parameters
}
"""Recipes for GPUs of one size, and what they set beside what the recipe that they extend does."""
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
    "quant_options": "",
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
    "enable_model_cpu_offload": False,
    "cpu_offload_split_threshold": None,
    "enable_optimizer_cpu_offload": False,
    "zero_cond_t": False,
    "enable_tensorboard_log": False,
    "enable_swanlab_log": False,
    "swanlab_project": None,
    "enable_wandb_log": False,
    "wandb_project": None,
    "enable_csv_log": False,
}
"""Documented names and their defaults."""
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
"""Values of the documented training scripts; values that they omit are at their default."""
WAN = {"dataset_repeat": 100, "height": 480, "width": 832, "use_gradient_checkpointing": True}
"""The scripts omit gradient checkpointing, which DiffSynth-Studio always enables for Wan."""
WAN_LORA = {
    **WAN,
    "learning_rate": 1e-4,
    "num_epochs": 5,
    "lora_base_model": "dit",
    "lora_target_modules": ["q", "k", "v", "o", "ffn.0", "ffn.2"],
    "lora_rank": 32,
}
WAN_FULL = {**WAN, "learning_rate": 1e-5, "num_epochs": 2, "trainable_models": ["dit"]}
WAN_DIT = "diffusion_pytorch_model*.safetensors"
TEXT_OF_WAN = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP_OF_WAN = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


def wan_files(model: str, *files: str) -> dict[str, list[str]]:
    return {"model_id_with_origin_paths": [f"Wan-AI/{model}:{file}" for file in files]}


T2V_1_3B = wan_files("Wan2.1-T2V-1.3B", WAN_DIT, TEXT_OF_WAN, "Wan2.1_VAE.pth")
T2V_14B = wan_files("Wan2.1-T2V-14B", WAN_DIT, TEXT_OF_WAN, "Wan2.1_VAE.pth")
I2V_480P = {
    **wan_files("Wan2.1-I2V-14B-480P", WAN_DIT, TEXT_OF_WAN, "Wan2.1_VAE.pth", CLIP_OF_WAN),
    "extra_inputs": ["input_image"],
}
I2V_720P = {
    **wan_files("Wan2.1-I2V-14B-720P", WAN_DIT, TEXT_OF_WAN, "Wan2.1_VAE.pth", CLIP_OF_WAN),
    "extra_inputs": ["input_image"],
    "height": 720,
    "width": 1280,
    "use_gradient_checkpointing_offload": True,
    "initialize_model_on_cpu": True,
}
TI2V_5B = {
    **wan_files("Wan2.2-TI2V-5B", WAN_DIT, TEXT_OF_WAN, "Wan2.2_VAE.pth"),
    "extra_inputs": ["input_image"],
    "num_frames": 49,
}
REFERENCE |= {
    "wan2.1-t2v-1.3b-lora": {**WAN_LORA, **T2V_1_3B},
    "wan2.1-t2v-1.3b-full": {**WAN_FULL, **T2V_1_3B},
    "wan2.1-t2v-14b-lora": {**WAN_LORA, **T2V_14B},
    "wan2.1-t2v-14b-full": {**WAN_FULL, **T2V_14B},
    "wan2.1-i2v-14b-480p-lora": {**WAN_LORA, **I2V_480P},
    "wan2.1-i2v-14b-480p-full": {**WAN_FULL, **I2V_480P, "initialize_model_on_cpu": True},
    "wan2.1-i2v-14b-720p-lora": {**WAN_LORA, **I2V_720P},
    "wan2.1-i2v-14b-720p-full": {**WAN_FULL, **I2V_720P, "num_frames": 49},
    "wan2.2-ti2v-5b-lora": {**WAN_LORA, **TI2V_5B},
    "wan2.2-ti2v-5b-full": {**WAN_FULL, **TI2V_5B},
}


def wan_experts(model: str, boundary: float, **values: object) -> dict[str, dict[str, object]]:
    """The two stages of Wan 2.2 A14B: the noisier part of the timestep table, then the rest."""
    common = {"num_frames": 49, **values}
    high, low = (
        wan_files(model, f"{name}_noise_model/{WAN_DIT}", TEXT_OF_WAN, "Wan2.1_VAE.pth") for name in ("high", "low")
    )
    return {
        "high": {**common, **high, "max_timestep_boundary": boundary, "min_timestep_boundary": 0.0},
        "low": {**common, **low, "max_timestep_boundary": 1.0, "min_timestep_boundary": boundary},
    }


IMAGE = {"extra_inputs": ["input_image"]}
STAGED = {
    "wan2.2-t2v-a14b-lora": wan_experts("Wan2.2-T2V-A14B", 0.417, **WAN_LORA),
    "wan2.2-t2v-a14b-full": wan_experts("Wan2.2-T2V-A14B", 0.417, **WAN_FULL),
    "wan2.2-i2v-a14b-lora": wan_experts("Wan2.2-I2V-A14B", 0.358, **WAN_LORA, **IMAGE),
    "wan2.2-i2v-a14b-full": wan_experts(
        "Wan2.2-I2V-A14B", 0.358, **WAN_FULL, **IMAGE, use_gradient_checkpointing_offload=True
    ),
}
"""The same for models that are trained in stages."""

FLUX1_TARGETS = [
    *("a_to_qkv", "b_to_qkv", "ff_a.0", "ff_a.2", "ff_b.0", "ff_b.2", "a_to_out", "b_to_out", "proj_out"),
    *("norm.linear", "norm1_a.linear", "norm1_b.linear", "to_qkv_mlp"),
]
FLUX_LORA = {"learning_rate": 1e-4, "num_epochs": 5, "lora_base_model": "dit", "lora_rank": 32}
FLUX1_LORA = {
    **FLUX_LORA,
    "lora_target_modules": FLUX1_TARGETS,
    "align_to_opensource_format": True,
    "use_gradient_checkpointing": True,
}
FLUX1_FULL = {
    "dataset_repeat": 400,
    "learning_rate": 1e-5,
    "num_epochs": 1,
    "trainable_models": ["dit"],
    "use_gradient_checkpointing": True,
}
KONTEXT = {"dataset_repeat": 400, "data_file_keys": ["image", "kontext_images"], "extra_inputs": ["kontext_images"]}


def flux1_files(model: str, transformer: str) -> dict[str, list[str]]:
    encoders = ("text_encoder/model.safetensors", "text_encoder_2/*.safetensors", "ae.safetensors")
    names = [f"{model}:{transformer}.safetensors", *(f"FLUX.1-dev:{file}" for file in encoders)]
    return {"model_id_with_origin_paths": [f"black-forest-labs/{name}" for name in names]}


DEV = flux1_files("FLUX.1-dev", "flux1-dev")
KREA = flux1_files("FLUX.1-Krea-dev", "flux1-krea-dev")
KONTEXT_FILES = flux1_files("FLUX.1-Kontext-dev", "flux1-kontext-dev")
REFERENCE |= {
    "flux.1-dev-lora": {**FLUX1_LORA, **DEV, "dataset_repeat": 50},
    "flux.1-dev-full": {**FLUX1_FULL, **DEV},
    "flux.1-krea-dev-lora": {**FLUX1_LORA, **KREA, "dataset_repeat": 50},
    "flux.1-krea-dev-full": {**FLUX1_FULL, **KREA},
    "flux.1-kontext-dev-lora": {**FLUX1_LORA, **KONTEXT_FILES, **KONTEXT},
    "flux.1-kontext-dev-full": {**FLUX1_FULL, **KONTEXT_FILES, **KONTEXT},
}


def klein(transformer: str, size: str) -> dict[str, object]:
    """A transformer of FLUX.2 klein with the encoders of its size."""
    beside = f"black-forest-labs/FLUX.2-klein-{size}"
    return {
        "dataset_repeat": 50,
        "use_gradient_checkpointing": True,
        "model_id_with_origin_paths": [
            f"{beside}:text_encoder/*.safetensors",
            f"black-forest-labs/FLUX.2-klein-{transformer}:transformer/*.safetensors",
            f"{beside}:vae/diffusion_pytorch_model.safetensors",
        ],
        "tokenizer_path": f"{beside}:tokenizer/",
    }


def klein_targets(single_blocks: int) -> list[str]:
    return [
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("linear_in", "linear_out", "to_qkv_mlp_proj"),
        *(f"single_transformer_blocks.{block}.attn.to_out" for block in range(single_blocks)),
    ]


KLEIN_FULL = {"learning_rate": 1e-5, "num_epochs": 2, "trainable_models": ["dit"]}
for size, single_blocks in (("4B", 20), ("9B", 24)):
    for transformer in (size, f"base-{size}"):
        name, files = f"flux.2-klein-{transformer.lower()}", klein(transformer, size)
        lora = {**FLUX_LORA, "lora_target_modules": klein_targets(single_blocks)}
        REFERENCE |= {f"{name}-lora": {**files, **lora}, f"{name}-full": {**files, **KLEIN_FULL}}

EDIT = {"data_file_keys": ["image", "edit_image"], "extra_inputs": ["edit_image"]}
for model, values in (("Edit", {}), ("Edit-2509", {}), ("Edit-2511", {"zero_cond_t": True})):
    files = [f"Qwen/Qwen-Image-{model}:{TRANSFORMER}", *ENCODERS]
    edit = {**EDIT, **values, "model_id_with_origin_paths": files}
    name = f"qwen-image-{model.lower()}"
    REFERENCE |= {f"{name}-lora": {**LORA, **edit}, f"{name}-full": {**FULL, **edit}}

FAMILIES = {"qwen-image": "qwen-image", "wan": "wan", "flux.1": "flux", "flux.2": "flux2"}
"""Prefix of recipe names -> family."""

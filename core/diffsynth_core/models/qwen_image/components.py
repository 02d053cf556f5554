"""Building the components of Qwen-Image, and inferring their configuration from shapes if there is no config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.configs import read_config
from diffsynth_core.models.control import CONTROLNET
from diffsynth_core.models.shapes import ROPE_PROPORTION, count_blocks, split_even
from diffsynth_core.models.spec import ComponentFiles, Shapes

DEFAULT_HEAD_SIZE = 128
"""Attention head size of Qwen2.5-VL's text model, which shapes do not determine (only heads x head size)."""
MROPE_PROPORTION = (16, 24, 24)
"""Rotary sections (time, height, width) of Qwen2.5-VL, in half a head of size 128."""
VISION_HEAD_SIZE = 80
"""Attention head size of the vision tower."""
VISION_FULL_ATTENTION_EVERY = 8
"""Interval of blocks with attention over the whole image: 7, 15, 23 and 31 of 32."""


def config_of(files: ComponentFiles, shapes: Shapes) -> dict[str, Any]:
    """Return the constructor options of a component, from config.json or from shapes."""
    if files.config_path:
        return read_config(files.config_path, shapes)
    infer = {
        "dit": infer_transformer,
        "text_encoder": infer_text_encoder,
        "vae": infer_vae,
        CONTROLNET: infer_controlnet,
    }[files.component]
    return infer(shapes)


def build(component: str, config: Mapping[str, Any]) -> nn.Module:
    """Build the diffusers or transformers module of a component."""
    options = {name: value for name, value in config.items() if not name.startswith("_")}
    if component == "text_encoder":
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**options))  # type: ignore[no-any-return]
    if component == "vae":
        from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage

        return AutoencoderKLQwenImage.from_config(options)  # type: ignore[no-any-return]
    if component == CONTROLNET:
        from diffusers.models.controlnets.controlnet_qwenimage import QwenImageControlNetModel

        return QwenImageControlNetModel.from_config(options)  # type: ignore[no-any-return]
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel.from_config(options)  # type: ignore[no-any-return]


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of Qwen2.5-VL from local files."""
    from transformers import Qwen2Tokenizer

    try:
        return Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise DiffSynthError(
            f"cannot read the tokenizer in `{folder}`: {error}",
            "download the folder again, or pass another with `--tokenizer_path`",
        ) from error


def load_processor(folder: Path) -> Any:
    """Load the image processor of Qwen2.5-VL from local files, in the variant that requires only Pillow."""
    from transformers import Qwen2VLImageProcessorPil

    try:
        return Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise DiffSynthError(
            f"cannot read the processor in `{folder}`: {error}",
            "download the folder again, or pass another with `--processor_path`",
        ) from error


def infer_transformer(shapes: Shapes) -> dict[str, Any]:
    """Infer the options of `QwenImageTransformer2DModel` from shapes.

    Shapes do not determine the rotary axes, which keep the published proportion, nor `zero_cond_t`, which is a
    parameter.
    """
    return {**_infer_blocks(shapes), "out_channels": shapes["proj_out.weight"][0] // 4}


def infer_controlnet(shapes: Shapes) -> dict[str, Any]:
    """Infer the options of `QwenImageControlNetModel`, which are those of the transformer and one more."""
    blocks = _infer_blocks(shapes)
    control_channels = shapes["controlnet_x_embedder.weight"][1]
    return {**blocks, "extra_condition_channels": control_channels - blocks["in_channels"]}


def _infer_blocks(shapes: Shapes) -> dict[str, Any]:
    """Return the options that the transformer and a ControlNet share."""
    head_size = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    width, in_channels = shapes["img_in.weight"]
    return {
        "patch_size": 2,
        "in_channels": in_channels,
        "num_layers": count_blocks(shapes, "transformer_blocks."),
        "attention_head_dim": head_size,
        "num_attention_heads": width // head_size,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "axes_dims_rope": list(split_even(head_size, ROPE_PROPORTION)),
    }


def infer_text_encoder(shapes: Shapes) -> dict[str, Any]:
    """Infer the options of `Qwen2_5_VLForConditionalGeneration` from shapes."""
    prefix = "model.language_model"
    vocabulary, width = shapes[f"{prefix}.embed_tokens.weight"]
    query, _ = shapes[f"{prefix}.layers.0.self_attn.q_proj.weight"]
    key, _ = shapes[f"{prefix}.layers.0.self_attn.k_proj.weight"]
    head_size = DEFAULT_HEAD_SIZE
    vision_width, _, temporal_patch, patch, _ = shapes["model.visual.patch_embed.proj.weight"]
    depth = count_blocks(shapes, "model.visual.blocks.")
    merged, _ = shapes["model.visual.merger.mlp.0.weight"]
    return {
        "text_config": {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": shapes[f"{prefix}.layers.0.mlp.gate_proj.weight"][0],
            "num_hidden_layers": count_blocks(shapes, f"{prefix}.layers."),
            "num_attention_heads": query // head_size,
            "num_key_value_heads": key // head_size,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [side * head_size // 128 for side in MROPE_PROPORTION]},
        },
        "vision_config": {
            "depth": depth,
            "hidden_size": vision_width,
            "intermediate_size": shapes["model.visual.blocks.0.mlp.gate_proj.weight"][0],
            "num_heads": max(1, vision_width // VISION_HEAD_SIZE),
            "out_hidden_size": shapes["model.visual.merger.mlp.2.weight"][0],
            "patch_size": patch,
            "temporal_patch_size": temporal_patch,
            "spatial_merge_size": round((merged / vision_width) ** 0.5),
            "window_size": 112,
            "fullatt_block_indexes": list(range(VISION_FULL_ATTENTION_EVERY - 1, depth, VISION_FULL_ATTENTION_EVERY)),
        },
        "tie_word_embeddings": "lm_head.weight" not in shapes,
    }


def infer_vae(shapes: Shapes) -> dict[str, Any]:
    """Infer the options of `AutoencoderKLQwenImage`; mean and std of the latents are those of the published VAE."""
    base = shapes["encoder.conv_in.weight"][0]
    widths = [base]
    strides = []
    number = 0
    while any(name.startswith(f"encoder.down_blocks.{number}.") for name in shapes):
        block = f"encoder.down_blocks.{number}"
        if f"{block}.conv1.weight" in shapes:
            widths.append(shapes[f"{block}.conv1.weight"][0])
        else:
            strides.append(f"{block}.time_conv.weight" in shapes)
        number += 1
    levels = len(strides) + 1
    blocks = (len(widths) - 1) // levels
    return {
        "base_dim": base,
        "z_dim": shapes["post_quant_conv.weight"][0],
        "dim_mult": [width // base for width in widths[1::blocks]],
        "num_res_blocks": blocks,
        "attn_scales": [],
        "temperal_downsample": strides,
    }

"""Building the components of FLUX.2, and inferring their configuration from shapes if there is no config.json."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.configs import read_config
from diffsynth_core.models.flux2.spec import GUIDANCE
from diffsynth_core.models.shapes import count_blocks
from diffsynth_core.models.spec import ComponentFiles, Shapes

ROPE_AXES = 4
"""Rotary axes of the transformer (image, row, column, text), 32 channels each at head size 128."""
ROPE_THETA = 1000000.0
"""Base of Qwen3's rotary frequencies."""
NORM_GROUPS = 32
"""Groups of the VAE's norms."""


def config_of(files: ComponentFiles, shapes: Shapes) -> dict[str, Any]:
    """Return the constructor options of a component, from config.json or from shapes.

    If the files of a text encoder lack the output head, it is tied to the embedding, whatever config.json says: it is
    never used.
    """
    if not files.config_path:
        return {"dit": infer_transformer, "text_encoder": infer_text_encoder, "vae": infer_vae}[files.component](shapes)
    config = read_config(files.config_path, shapes)
    if files.component == "text_encoder" and "lm_head.weight" not in shapes:
        return config | {"tie_word_embeddings": True}
    return config


def build(component: str, config: Mapping[str, Any]) -> nn.Module:
    """Build the diffusers or transformers module of a component."""
    options = {name: value for name, value in config.items() if not name.startswith("_")}
    if component == "text_encoder":
        from transformers import Qwen3Config, Qwen3ForCausalLM

        return Qwen3ForCausalLM(Qwen3Config(**options))  # type: ignore[no-any-return]
    if component == "vae":
        from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2

        return AutoencoderKLFlux2.from_config(options)  # type: ignore[no-any-return]
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel

    return Flux2Transformer2DModel.from_config(options)  # type: ignore[no-any-return]


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of Qwen3 with its chat template from local files."""
    from transformers import Qwen2Tokenizer

    hint = "download the folder again, or pass another with `--tokenizer_path`"
    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise DiffSynthError(f"cannot read the tokenizer in `{folder}`: {error}", hint) from error
    if not tokenizer.chat_template:
        raise DiffSynthError(f"the tokenizer in `{folder}` has no chat template", hint)
    return tokenizer


def infer_transformer(shapes: Shapes) -> dict[str, Any]:
    """Infer the options of `Flux2Transformer2DModel` from shapes.

    Shapes do not determine the rotary axes, which keep the published proportion.
    """
    head_size = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    width, in_channels = shapes["x_embedder.weight"]
    return {
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0],
        "num_layers": count_blocks(shapes, "transformer_blocks."),
        "num_single_layers": count_blocks(shapes, "single_transformer_blocks."),
        "attention_head_dim": head_size,
        "num_attention_heads": width // head_size,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "timestep_guidance_channels": shapes["time_guidance_embed.timestep_embedder.linear_1.weight"][1],
        "mlp_ratio": shapes["transformer_blocks.0.ff.linear_out.weight"][1] / width,
        "axes_dims_rope": rope_axes(head_size),
        "guidance_embeds": GUIDANCE in shapes,
    }


def rope_axes(head_size: int) -> list[int]:
    """Return the rotary axes of a head: equal even parts; the first one takes the remainder."""
    side = head_size // (2 * ROPE_AXES) * 2
    return [head_size - (ROPE_AXES - 1) * side, *[side] * (ROPE_AXES - 1)]


def infer_text_encoder(shapes: Shapes) -> dict[str, Any]:
    """Infer the options of `Qwen3ForCausalLM` from shapes."""
    layer = "model.layers.0"
    vocabulary, width = shapes["model.embed_tokens.weight"]
    (head_size,) = shapes[f"{layer}.self_attn.q_norm.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[f"{layer}.mlp.gate_proj.weight"][0],
        "num_hidden_layers": count_blocks(shapes, "model.layers."),
        "head_dim": head_size,
        "num_attention_heads": shapes[f"{layer}.self_attn.q_proj.weight"][0] // head_size,
        "num_key_value_heads": shapes[f"{layer}.self_attn.k_proj.weight"][0] // head_size,
        "rope_theta": ROPE_THETA,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
    }


def infer_vae(shapes: Shapes) -> dict[str, Any]:
    """Infer the options of `AutoencoderKLFlux2`; norms have 32 groups, or the largest divisor of 32 and all widths."""
    widths = _widths(shapes, "encoder.down_blocks")
    decoder_widths = _widths(shapes, "decoder.up_blocks")[::-1]
    latent_channels = shapes["encoder.conv_out.weight"][0] // 2
    patch = math.isqrt(shapes["bn.running_mean"][0] // latent_channels)
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(decoder_widths),
        "block_out_channels": widths,
        "decoder_block_out_channels": decoder_widths if decoder_widths != widths else None,
        "layers_per_block": count_blocks(shapes, "encoder.down_blocks.0.resnets."),
        "latent_channels": latent_channels,
        "norm_num_groups": math.gcd(NORM_GROUPS, *widths, *decoder_widths),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in shapes,
        "patch_size": [patch, patch],
    }


def _widths(shapes: Shapes, blocks: str) -> list[int]:
    """Return the output channels of each numbered block."""
    return [
        shapes[f"{blocks}.{number}.resnets.0.conv1.weight"][0] for number in range(count_blocks(shapes, f"{blocks}."))
    ]

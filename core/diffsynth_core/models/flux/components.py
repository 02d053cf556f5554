"""Building the components of FLUX.1, and inferring their configuration from tensor shapes if there is no config.json.

Shapes are by module key, whichever layout the files have.
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.configs import read_config
from diffsynth_core.models.control import CONTROLNET
from diffsynth_core.models.shapes import ROPE_PROPORTION, count_blocks, infer_t5_encoder, split_even
from diffsynth_core.models.spec import ComponentFiles, Shapes

CLIP_HEAD_SIZE = 64
"""Attention head size of CLIP's text model, which shapes do not determine (only heads x head size)."""
NORM_GROUPS = 32
"""Groups of the VAE's norms."""
SCALING_FACTOR = 0.3611
"""Scale of the published VAE's latents. Source: black-forest-labs/flux, src/flux/util.py."""
SHIFT_FACTOR = 0.1159
"""Shift of the published VAE's latents, from the same file."""


def config_of(files: ComponentFiles, shapes: Shapes) -> dict[str, Any]:
    """Return the constructor options of a component, from config.json or from shapes."""
    if files.config_path:
        return read_config(files.config_path, shapes)
    infer = {
        "dit": infer_transformer,
        "text_encoder_1": infer_clip,
        "text_encoder_2": infer_t5_encoder,
        "vae": infer_vae,
        CONTROLNET: infer_controlnet,
    }[files.component]
    return infer(shapes)


def build(component: str, config: Mapping[str, Any]) -> nn.Module:
    """Build the diffusers or transformers module of a component; text encoders without dropout."""
    options = {name: value for name, value in config.items() if not name.startswith("_")}
    if component == "text_encoder_1":
        from transformers import CLIPTextConfig, CLIPTextModel

        return CLIPTextModel(CLIPTextConfig(**{**options, "attention_dropout": 0.0}))  # type: ignore[no-any-return]
    if component == "text_encoder_2":
        from transformers import T5Config, T5EncoderModel

        return T5EncoderModel(T5Config(**{**options, "dropout_rate": 0.0}))  # type: ignore[no-any-return]
    if component == "vae":
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        return AutoencoderKL.from_config(options)  # type: ignore[no-any-return]
    if component == CONTROLNET:
        from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel

        with warnings.catch_warnings():
            # diffusers 0.42 itself uses a class here that it declares deprecated.
            warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)
            return FluxControlNetModel.from_config(options)  # type: ignore[no-any-return]
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    return FluxTransformer2DModel.from_config(options)  # type: ignore[no-any-return]


def load_tokenizer(parameter: str, folder: Path) -> Any:
    """Load the tokenizer of CLIP, or that of T5 exactly as in its tokenizer.json, from local files.

    transformers 5 rebuilds T5 tokenizers, without the normalization in tokenizer.json.
    """
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    loader = CLIPTokenizer if parameter == "tokenizer_1_path" else PreTrainedTokenizerFast
    try:
        return loader.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise DiffSynthError(
            f"cannot read the tokenizer in `{folder}`: {error}",
            f"download the folder again, or pass another with `--{parameter}`",
        ) from error


def infer_transformer(shapes: Shapes) -> dict[str, Any]:
    """Infer the options of `FluxTransformer2DModel` from shapes.

    Shapes do not determine the rotary axes, which keep the published proportion.
    """
    out_channels, blocks = shapes["proj_out.weight"][0], infer_controlnet(shapes)
    return {**blocks, "out_channels": out_channels if out_channels != blocks["in_channels"] else None}


def infer_controlnet(shapes: Shapes) -> dict[str, Any]:
    """Infer the options of `FluxControlNetModel`, which are those of the transformer."""
    head_size = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    width, in_channels = shapes["x_embedder.weight"]
    return {
        "patch_size": 1,
        "in_channels": in_channels,
        "num_layers": count_blocks(shapes, "transformer_blocks."),
        "num_single_layers": count_blocks(shapes, "single_transformer_blocks."),
        "attention_head_dim": head_size,
        "num_attention_heads": width // head_size,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "axes_dims_rope": list(split_even(head_size, ROPE_PROPORTION)),
    }


def infer_clip(shapes: Shapes) -> dict[str, Any]:
    """Infer the options of `CLIPTextModel`.

    The last token of the vocabulary ends a text, which is where the pooled state is taken. The head size is 64 if that
    divides the width, otherwise the largest power of two that does.
    """
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "projection_dim": width,
        "num_hidden_layers": count_blocks(shapes, "encoder.layers."),
        "num_attention_heads": width // math.gcd(width, CLIP_HEAD_SIZE),
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "hidden_act": "quick_gelu",
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def infer_vae(shapes: Shapes) -> dict[str, Any]:
    """Infer the options of `AutoencoderKL`; scale and shift of the latents are those of the published VAE.

    Norms have 32 groups, or the largest smaller power of two that divides all widths.
    """
    levels = count_blocks(shapes, "encoder.down_blocks.")
    widths = [shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels)]
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "layers_per_block": count_blocks(shapes, "encoder.down_blocks.0.resnets."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "norm_num_groups": math.gcd(NORM_GROUPS, *widths),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "scaling_factor": SCALING_FACTOR,
        "shift_factor": SHIFT_FACTOR,
    }

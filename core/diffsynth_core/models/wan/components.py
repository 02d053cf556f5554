"""Building the components of Wan, and inferring their configuration from shapes if there is no config.json.

Shapes are by module key, whichever layout the files have.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.configs import read_config
from diffsynth_core.models.shapes import count_blocks, infer_t5_encoder
from diffsynth_core.models.spec import ComponentFiles, Shapes
from diffsynth_core.models.wan.sizes import head_size

IMAGE_ENCODER_HEADS = 16
"""Attention heads of CLIP ViT-H (16 x 80) and ViT-L (16 x 64)."""
ORIGINAL_CLASS = "WanModel"
"""Suffix of `_class_name` in the config.json of Wan's own repositories, which describes the transformer only although
it is in the folder of all components.
"""

LATENTS_MEAN_48 = [
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891),
    *(0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723),
    *(-0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
]
"""Mean of each latent channel of the published VAE 2.2. Source: Wan-Video/Wan2.2, wan/modules/vae2_2.py."""
LATENTS_STD_48 = [
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901),
    *(0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944),
    *(0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
]
"""Standard deviation of each latent channel of the published VAE 2.2, from the same file."""


def config_of(files: ComponentFiles, shapes: Shapes) -> dict[str, Any]:
    """Return the constructor options of a component, from config.json or from shapes."""
    infer = {
        "dit": infer_transformer,
        "text_encoder": infer_t5_encoder,
        "vae": infer_vae,
        "image_encoder": infer_image_encoder,
    }[files.component]
    if not files.config_path:
        return infer(shapes)
    config = read_config(files.config_path, shapes)
    if not str(config.get("_class_name")).endswith(ORIGINAL_CLASS):
        return config
    return translate_config(config, shapes)


def build(component: str, config: Mapping[str, Any]) -> nn.Module:
    """Build the diffusers or transformers module of a component; the text encoder without its dropout of 0.1."""
    options = {name: value for name, value in config.items() if not name.startswith("_")}
    if component == "text_encoder":
        from transformers import UMT5Config, UMT5EncoderModel

        return UMT5EncoderModel(UMT5Config(**{**options, "dropout_rate": 0.0}))  # type: ignore[no-any-return]
    if component == "image_encoder":
        from transformers import CLIPVisionConfig, CLIPVisionModel

        return CLIPVisionModel(CLIPVisionConfig(**options))  # type: ignore[no-any-return]
    if component == "vae":
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

        return AutoencoderKLWan.from_config(options)  # type: ignore[no-any-return]
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    return WanTransformer3DModel.from_config(options)  # type: ignore[no-any-return]


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of UMT5 exactly as in its tokenizer.json, from local files.

    transformers 5 rebuilds T5 tokenizers, without the byte fallback for rare characters.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise DiffSynthError(
            f"cannot read the tokenizer in `{folder}`: {error}",
            "download the folder again, or pass another with `--tokenizer_path`",
        ) from error


def translate_config(config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Return the options of `WanTransformer3DModel` from Wan's own config.json, with the rest inferred from shapes.

    `model_type` is ignored: Wan 2.1 I2V has an image embedder and 2.2 does not, but both are `i2v`.
    """
    renamed = {
        "num_layers": "num_layers",
        "num_heads": "num_attention_heads",
        "in_dim": "in_channels",
        "out_dim": "out_channels",
        "ffn_dim": "ffn_dim",
        "freq_dim": "freq_dim",
        "eps": "eps",
    }
    stated = {name: config[original] for original, name in renamed.items() if original in config}
    if "dim" in config and "num_heads" in config:
        stated["attention_head_dim"] = config["dim"] // config["num_heads"]
    return {**infer_transformer(shapes), **stated}


def infer_transformer(shapes: Shapes) -> dict[str, Any]:
    """Infer the options of `WanTransformer3DModel` from shapes.

    Shapes do not determine the head size: 128 if it divides the width, otherwise the largest power of two that does.
    """
    width, in_channels, *patch = shapes["patch_embedding.weight"]
    size = head_size(width)
    embedder = "condition_embedder"
    image = shapes.get(f"{embedder}.image_embedder.norm1.weight")
    added = shapes.get("blocks.0.attn2.add_k_proj.weight")
    positions = shapes.get(f"{embedder}.image_embedder.pos_embed")
    return {
        "patch_size": patch,
        "num_attention_heads": width // size,
        "attention_head_dim": size,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // math.prod(patch),
        "text_dim": shapes[f"{embedder}.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes[f"{embedder}.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": count_blocks(shapes, "blocks."),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "image_dim": image[0] if image else None,
        "added_kv_proj_dim": added[1] if added else None,
        "pos_embed_seq_len": positions[1] if positions else None,
    }


def infer_vae(shapes: Shapes) -> dict[str, Any]:
    """Infer the options of `AutoencoderKLWan` 2.1 or 2.2; mean and std of the latents are those of the published
    VAE.
    """
    residual = "encoder.down_blocks.0.resnets.0.conv1.weight" in shapes
    base, in_channels, *_ = shapes["encoder.conv_in.weight"]
    widths, strides, blocks = _nested_levels(shapes) if residual else _flat_levels(shapes)
    factors = [width // base for width in widths]
    decoder_base = shapes["decoder.conv_in.weight"][0] // factors[-1]
    channels = shapes["post_quant_conv.weight"][0]
    patch = math.isqrt(in_channels // 3)
    config = {
        "base_dim": base,
        "decoder_base_dim": decoder_base if decoder_base != base else None,
        "z_dim": channels,
        "dim_mult": factors,
        "num_res_blocks": blocks,
        "attn_scales": [],
        "temperal_downsample": strides,
        "is_residual": residual,
        "in_channels": in_channels,
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "patch_size": patch if patch > 1 else None,
        "scale_factor_temporal": 2 ** sum(strides),
        "scale_factor_spatial": 2 ** len(strides) * patch,
    }
    if channels == len(LATENTS_MEAN_48):
        return config | {"latents_mean": LATENTS_MEAN_48, "latents_std": LATENTS_STD_48}
    if channels == 16:  # the defaults of the class are those of the published VAE 2.1
        return config
    return config | {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}


def _flat_levels(shapes: Shapes) -> tuple[list[int], list[bool], int]:
    """Return (width of each level, whether time is downsampled after it, residual blocks per level) of VAE 2.1's
    encoder.
    """
    widths = []
    strides = []
    for number in range(count_blocks(shapes, "encoder.down_blocks.")):
        block = f"encoder.down_blocks.{number}"
        if f"{block}.conv1.weight" in shapes:
            widths.append(shapes[f"{block}.conv1.weight"][0])
        else:
            strides.append(f"{block}.time_conv.weight" in shapes)
    blocks = len(widths) // (len(strides) + 1)
    return widths[::blocks], strides, blocks


def _nested_levels(shapes: Shapes) -> tuple[list[int], list[bool], int]:
    """Return the same as `_flat_levels` for VAE 2.2."""
    levels = [f"encoder.down_blocks.{number}" for number in range(count_blocks(shapes, "encoder.down_blocks."))]
    widths = [shapes[f"{level}.resnets.0.conv1.weight"][0] for level in levels]
    strides = [f"{level}.downsampler.time_conv.weight" in shapes for level in levels[:-1]]
    return widths, strides, count_blocks(shapes, f"{levels[0]}.resnets.")


def infer_image_encoder(shapes: Shapes) -> dict[str, Any]:
    """Infer the options of `CLIPVisionModel`: 16 heads, or the largest smaller power of two that divides the width."""
    width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
    positions, _ = shapes["embeddings.position_embedding.weight"]
    return {
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count_blocks(shapes, "encoder.layers."),
        "num_attention_heads": math.gcd(width, IMAGE_ENCODER_HEADS),
        "patch_size": patch,
        "image_size": math.isqrt(positions - 1) * patch,
        "hidden_act": "gelu",
    }

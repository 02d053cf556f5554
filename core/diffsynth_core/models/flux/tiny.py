"""Tiny random FLUX.1 components, with the classes, file layouts and key names of the published ones."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from diffsynth_core.models.control import CONTROLNET
from diffsynth_core.models.flux import keys
from diffsynth_core.models.flux.captions import CLIP_TOKENS
from diffsynth_core.models.flux.components import CLIP_HEAD_SIZE, SCALING_FACTOR, SHIFT_FACTOR, build
from diffsynth_core.models.shapes import ROPE_PROPORTION, split_even
from diffsynth_core.models.tiny import (
    GAINS,
    diffusers_config,
    fill,
    published_name,
    tiny_t5,
    write_json,
    write_weights,
)
from diffsynth_core.models.tiny_tokenizers import unigram_vocabulary, write_pairs, write_unigram_tokenizer
from diffsynth_core.weights.key_maps import SAME_NAMES, KeyMap

DIFFUSERS_FOLDERS = ("transformer", "vae")
"""Folders whose files have the diffusers layout; transformers and VAEs elsewhere have the original one."""
LATENT_SPREAD = 0.62
"""Standard deviation of the random VAE's unscaled latents of photographs."""
CLIP_SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
"""The last two tokens of the vocabulary, as in CLIP."""
CLIP_MERGES = (("t", "h"), ("th", "e</w>"), ("a", "n"), ("an", "d</w>"), ("a", "n</w>"), ("o", "n</w>"), ("i", "n</w>"))
"""Merges of the tiny CLIP tokenizer."""


@dataclass(frozen=True)
class TinySizes:
    """Sizes of the random components; widths in channels."""

    blocks: int = 2
    heads: int = 2
    head_size: int = 16
    text_width: int = 64
    pooled_width: int = 32
    vae_width: int = 8


def write_tiny_weights(base: Path, component: str, model_id: str, pattern: str, sizes: TinySizes = TinySizes()) -> None:
    """Write one component below `base`/`model_id` to a path that matches `pattern`, which selects the layout.

    A text encoder includes its tokenizer. Original files of a transformer or VAE have no config.json, as published.
    """
    path = PurePosixPath(pattern)
    folder = base / model_id / path.parent
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[component](sizes)
    module = build(component, config).eval()
    fill(module, GAINS[component], seed=0)
    if component == "vae":
        _spread_latents(module)
    tensors = {name: tensor.detach().to(torch.bfloat16) for name, tensor in module.state_dict().items()}
    if component == "text_encoder_1":
        _write_clip_tokenizer(folder.parent / "tokenizer")
    elif component == "text_encoder_2":
        write_unigram_tokenizer(folder.parent / "tokenizer_2", byte_fallback=False)
    diffusers = component == CONTROLNET or path.parent.name in DIFFUSERS_FOLDERS
    if component in TEXT_ENCODER_CONFIGS:
        write_json(folder / "config.json", TEXT_ENCODER_CONFIGS[component] | config)
    elif diffusers:
        write_json(folder / "config.json", diffusers_config(module))
    renamed = _in_layout(_key_map(component, diffusers), tensors)
    write_weights(folder, published_name(component, path.name), renamed)


def _transformer(sizes: TinySizes) -> dict[str, Any]:
    return {
        "num_layers": sizes.blocks,
        "num_single_layers": sizes.blocks,
        "attention_head_dim": sizes.head_size,
        "num_attention_heads": sizes.heads,
        "joint_attention_dim": sizes.text_width,
        "pooled_projection_dim": sizes.pooled_width,
        "guidance_embeds": True,
        "axes_dims_rope": list(split_even(sizes.head_size, ROPE_PROPORTION)),
    }


def _clip(sizes: TinySizes) -> dict[str, Any]:
    """As in the published config, `eos_token_id` 2 is not a token of the vocabulary: it selects the highest id in
    a text.
    """
    return {
        "vocab_size": len(clip_vocabulary()),
        "hidden_size": sizes.pooled_width,
        "intermediate_size": 4 * sizes.pooled_width,
        "projection_dim": sizes.pooled_width,
        "num_hidden_layers": 2,
        "num_attention_heads": sizes.pooled_width // math.gcd(sizes.pooled_width, CLIP_HEAD_SIZE),
        "max_position_embeddings": CLIP_TOKENS,
        "hidden_act": "quick_gelu",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _t5(sizes: TinySizes) -> dict[str, Any]:
    return tiny_t5(sizes.text_width, len(unigram_vocabulary(byte_fallback=False)))


def _vae(sizes: TinySizes) -> dict[str, Any]:
    width = sizes.vae_width
    return {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [width, 2 * width, 2 * width, 2 * width],
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": width,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": SCALING_FACTOR,
        "shift_factor": SHIFT_FACTOR,
    }


CONFIGS = {"dit": _transformer, "text_encoder_1": _clip, "text_encoder_2": _t5, "vae": _vae, CONTROLNET: _transformer}
"""Component -> constructor options."""
TEXT_ENCODER_CONFIGS: dict[str, dict[str, Any]] = {
    "text_encoder_1": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"},
    "text_encoder_2": {"architectures": ["T5EncoderModel"], "model_type": "t5", "tie_word_embeddings": False},
}
"""Keys of the text encoders' config.json other than constructor options."""


@torch.no_grad()
def _spread_latents(module: Any) -> None:
    """Give latents the published mean and spread, so that they are normalized to 0 and 1: the original file does not
    state them.
    """
    channels = module.config.latent_channels
    module.encoder.conv_out.weight[:channels] /= SCALING_FACTOR * LATENT_SPREAD
    module.encoder.conv_out.bias[:channels] = SHIFT_FACTOR


def _key_map(component: str, diffusers: bool) -> KeyMap:
    originals = {"dit": keys.DIT_ORIGINAL, "vae": keys.VAE_ORIGINAL}
    if component in originals:
        return SAME_NAMES if diffusers else originals[component]
    return {"text_encoder_1": keys.CLIP, "text_encoder_2": keys.T5, CONTROLNET: SAME_NAMES}[component]


def _in_layout(table: KeyMap, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a module under the keys of a layout."""
    return {name: table.fuse(name, tensors) for name in table.to_sources(tensors)}


def clip_vocabulary() -> dict[str, int]:
    """Return bytes, bytes that end a word, merged words and special tokens, with their ids."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merged = [left + right for left, right in CLIP_MERGES]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *merged, *CLIP_SPECIAL_TOKENS]
    return {token: number for number, token in enumerate(tokens)}


def _write_clip_tokenizer(folder: Path) -> None:
    """Write a tokenizer in the published layout: vocab.json, merges.txt and configuration."""
    write_pairs(folder, clip_vocabulary(), CLIP_MERGES)
    start, end = CLIP_SPECIAL_TOKENS
    special = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    write_json(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_TOKENS, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", {**special, **config})

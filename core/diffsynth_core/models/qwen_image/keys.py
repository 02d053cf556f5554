"""Keys of Qwen-Image's tensors and modules. No torch.

The documented names are those of diffusers (transformer, VAE) and of current transformers (text encoder). Files of the
text encoder have the keys of earlier transformers releases: `model.layers…`, `visual.…`.
"""

import re

from diffsynth_core.models.control import count_added
from diffsynth_core.models.shapes import count_blocks
from diffsynth_core.weights.key_maps import PrefixMap

TEXT_ENCODER_FILES = PrefixMap(
    ("visual.", "model.visual."),
    ("model.language_model.", "model.language_model."),
    ("model.visual.", "model.visual."),
    ("model.", "model.language_model."),
)
"""Keys in files of the text encoder, of earlier or current releases -> module keys."""

TEXT_ENCODER_PUBLISHED = PrefixMap(("visual.", "model.visual."), ("model.", "model.language_model."))
"""Keys in the published files of the text encoder -> module keys."""

LORA_TARGETS = (
    "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out",
    "img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1",
)  # fmt: skip
"""The documented `lora_target_modules` of the transformer."""

DIT_MODULES = (
    "img_in",
    "txt_in",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "transformer_blocks.{}.img_mod.1",
    "transformer_blocks.{}.txt_mod.1",
    "transformer_blocks.{}.attn.to_q",
    "transformer_blocks.{}.attn.to_k",
    "transformer_blocks.{}.attn.to_v",
    "transformer_blocks.{}.attn.to_out.0",
    "transformer_blocks.{}.attn.add_q_proj",
    "transformer_blocks.{}.attn.add_k_proj",
    "transformer_blocks.{}.attn.add_v_proj",
    "transformer_blocks.{}.attn.to_add_out",
    "transformer_blocks.{}.img_mlp.net.0.proj",
    "transformer_blocks.{}.img_mlp.net.2",
    "transformer_blocks.{}.txt_mlp.net.0.proj",
    "transformer_blocks.{}.txt_mlp.net.2",
    "norm_out.linear",
    "proj_out",
)
"""Documented names of all modules of the transformer with a matrix."""

DIT_SIDES = {
    "transformer_blocks.{}.img_mod.1": (6, 1),
    "transformer_blocks.{}.txt_mod.1": (6, 1),
    "transformer_blocks.{}.img_mlp.net.0.proj": (4, 1),
    "transformer_blocks.{}.img_mlp.net.2": (1, 4),
    "transformer_blocks.{}.txt_mlp.net.0.proj": (4, 1),
    "transformer_blocks.{}.txt_mlp.net.2": (1, 4),
}
"""Rows and columns of weights, in multiples of the transformer's width."""
DIT_BLOCKS = {"transformer_blocks.": 60}
"""Numbers of blocks of the largest published transformer."""

LAST_TEXT_MODULES = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
"""Modules of the last block that only affect the unused text stream after it, so they receive no gradient."""

_TIME_CONVOLUTION = re.compile(r"^encoder\.down_blocks\.\d+\.time_conv")


def unused_in_text_encoder(names: frozenset[str]) -> frozenset[str]:
    """Return the output head, and the vision tower, which only reference images pass through."""
    return frozenset({"model.visual", "lm_head"})


def unused_in_vae(names: frozenset[str]) -> frozenset[str]:
    """Return the decoder, and convolutions over time: an image is one frame, which is not downsampled in time."""
    time = {match[0] for match in map(_TIME_CONVOLUTION.match, names) if match}
    return frozenset({"decoder", "post_quant_conv", *time})


def dead_modules(names: frozenset[str]) -> frozenset[str]:
    """Return the modules of the transformer that cannot affect its output, given the keys of modules or tensors."""
    return _text_half(count_blocks(names, "transformer_blocks.") - 1)


def dead_in_controlnet(names: frozenset[str], blocks: int | None) -> frozenset[str]:
    """Return the modules of a ControlNet that cannot affect a transformer with this number of blocks (None:
    unlimited).

    Its text stream ends with its last block in use.
    """
    own = count_blocks(names, "transformer_blocks.")
    used = own if blocks is None else count_added(own, blocks)
    idle = {f"{part}.{block}" for block in range(used, own) for part in ("transformer_blocks", "controlnet_blocks")}
    return _text_half(used - 1) | idle


def _text_half(last: int) -> frozenset[str]:
    """Return the modules that only affect the text stream after the last block."""
    return frozenset(f"transformer_blocks.{last}.{module}" for module in LAST_TEXT_MODULES if last >= 0)

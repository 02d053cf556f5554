"""Names of Qwen-Image's tensors and modules. No torch.

The documented names are those of diffusers (transformer, VAE) and of today's transformers (text encoder). Files of the
text encoder carry the names of earlier transformers releases: `model.layers…`, `visual.…`.
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
"""Names in files of the text encoder, old or new style -> names in the module."""

TEXT_ENCODER_PUBLISHED = PrefixMap(("visual.", "model.visual."), ("model.", "model.language_model."))
"""Names in the published files of the text encoder -> names in the module."""

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
"""Documented names of all modules of the transformer that are matrices."""

DIT_SIDES = {
    "transformer_blocks.{}.img_mod.1": (6, 1),
    "transformer_blocks.{}.txt_mod.1": (6, 1),
    "transformer_blocks.{}.img_mlp.net.0.proj": (4, 1),
    "transformer_blocks.{}.img_mlp.net.2": (1, 4),
    "transformer_blocks.{}.txt_mlp.net.0.proj": (4, 1),
    "transformer_blocks.{}.txt_mlp.net.2": (1, 4),
}
"""Rows and columns of weights, in widths of the transformer."""
DIT_BLOCKS = {"transformer_blocks.": 60}
"""Blocks of the largest published transformer."""

LAST_TEXT_MODULES = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
"""Of the last block: they only shape the text stream behind it, which nothing reads, so no gradient reaches them."""

_TIME_CONVOLUTION = re.compile(r"^encoder\.down_blocks\.\d+\.time_conv")


def unused_in_text_encoder(names: frozenset[str]) -> frozenset[str]:
    """Captions pass neither through the image half of Qwen2.5-VL, which images to edit do reach, nor through its
    vocabulary head."""
    return frozenset({"model.visual", "lm_head"})


def unused_in_vae(names: frozenset[str]) -> frozenset[str]:
    """Training reads latents, so nothing is decoded, and an image is one frame, so nothing is shrunk in time."""
    time = {match[0] for match in map(_TIME_CONVOLUTION.match, names) if match}
    return frozenset({"decoder", "post_quant_conv", *time})


def dead_modules(names: frozenset[str]) -> frozenset[str]:
    """Modules of the transformer that cannot influence its output, given the names of its modules or tensors."""
    return _text_half(count_blocks(names, "transformer_blocks.") - 1)


def dead_in_controlnet(names: frozenset[str], blocks: int | None) -> frozenset[str]:
    """Modules of a ControlNet that cannot influence what a transformer of `blocks` blocks (None: many) makes of it.

    Its text ends with its last block in use.
    """
    own = count_blocks(names, "transformer_blocks.")
    used = own if blocks is None else count_added(own, blocks)
    idle = {f"{part}.{block}" for block in range(used, own) for part in ("transformer_blocks", "controlnet_blocks")}
    return _text_half(used - 1) | idle


def _text_half(last: int) -> frozenset[str]:
    """What shapes the text behind the last block, if there is any."""
    return frozenset(f"transformer_blocks.{last}.{module}" for module in LAST_TEXT_MODULES if last >= 0)

"""Names of Qwen-Image's tensors and modules. No torch.

The documented names are those of diffusers (transformer, VAE) and of today's transformers (text encoder). Files of the
text encoder carry the names of earlier transformers releases: `model.layers…`, `visual.…`.
"""

import re

from diffsynth_core.state_dicts.key_maps import PrefixMap

TEXT_ENCODER_FILES = PrefixMap(
    ("visual.", "model.visual."),
    ("model.language_model.", "model.language_model."),
    ("model.visual.", "model.visual."),
    ("model.", "model.language_model."),
)
"""Names in files of the text encoder, old or new style -> names in the module."""

LORA_TARGETS = (
    "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out",
    "img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1",
)  # fmt: skip
"""The documented `lora_target_modules` of the transformer."""

LAST_TEXT_MODULES = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
"""Of the last block: they only shape the text stream behind it, which nothing reads, so no gradient reaches them."""

_TIME_CONVOLUTION = re.compile(r"^encoder\.down_blocks\.\d+\.time_conv")
_BLOCK = re.compile(r"^transformer_blocks\.(\d+)\.")


def unused_in_text_encoder(names: frozenset[str]) -> frozenset[str]:
    """Captions pass neither through the picture half of Qwen2.5-VL, which pictures to edit do reach, nor through its
    vocabulary head."""
    return frozenset({"model.visual", "lm_head"})


def unused_in_vae(names: frozenset[str]) -> frozenset[str]:
    """Training reads latents, so nothing is decoded, and a picture is one frame, so nothing is shrunk in time."""
    time = {match[0] for match in map(_TIME_CONVOLUTION.match, names) if match}
    return frozenset({"decoder", "post_quant_conv", *time})


def dead_modules(names: frozenset[str]) -> frozenset[str]:
    """Modules of the transformer that cannot influence its output, given the names of its modules or tensors."""
    blocks = [int(match[1]) for match in map(_BLOCK.match, names) if match]
    if not blocks:
        return frozenset()
    return frozenset(f"transformer_blocks.{max(blocks)}.{module}" for module in LAST_TEXT_MODULES)

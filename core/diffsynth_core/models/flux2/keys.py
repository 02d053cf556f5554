"""Keys of FLUX.2's tensors and modules. No torch.

Files, documented names and modules have the same keys, those of diffusers (transformer, VAE) and transformers (Qwen3).
LoRA files of ComfyUI and of kohya's trainers use the names of black-forest-labs/flux2, src/flux2/model.py.
"""

import re

from diffsynth_core.weights.key_maps import TableMap

LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "linear_in", "linear_out", "to_qkv_mlp_proj", "to_out",
)  # fmt: skip
"""The documented `lora_target_modules` of the transformer.

Recipes list the last one block by block, `single_transformer_blocks.N.attn.to_out`. As a suffix it selects the same
modules: in double blocks `to_out` is a list, whose first item is `to_out.0`.
"""

DIT_ORIGINAL = TableMap(
    {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "double_blocks.{}.img_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_q.weight",
        "double_blocks.{}.img_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_k.weight",
        "double_blocks.{}.img_attn.proj": "transformer_blocks.{}.attn.to_out.0",
        "double_blocks.{}.img_mlp.0": "transformer_blocks.{}.ff.linear_in",
        "double_blocks.{}.img_mlp.2": "transformer_blocks.{}.ff.linear_out",
        "double_blocks.{}.txt_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_added_q.weight",
        "double_blocks.{}.txt_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_added_k.weight",
        "double_blocks.{}.txt_attn.proj": "transformer_blocks.{}.attn.to_add_out",
        "double_blocks.{}.txt_mlp.0": "transformer_blocks.{}.ff_context.linear_in",
        "double_blocks.{}.txt_mlp.2": "transformer_blocks.{}.ff_context.linear_out",
        "single_blocks.{}.norm.query_norm.scale": "single_transformer_blocks.{}.attn.norm_q.weight",
        "single_blocks.{}.norm.key_norm.scale": "single_transformer_blocks.{}.attn.norm_k.weight",
        "single_blocks.{}.linear1": "single_transformer_blocks.{}.attn.to_qkv_mlp_proj",
        "single_blocks.{}.linear2": "single_transformer_blocks.{}.attn.to_out",
        "final_layer.linear": "proj_out",
    },
    fused={
        "double_blocks.{}.img_attn.qkv": (
            "transformer_blocks.{}.attn.to_q",
            "transformer_blocks.{}.attn.to_k",
            "transformer_blocks.{}.attn.to_v",
        ),
        "double_blocks.{}.txt_attn.qkv": (
            "transformer_blocks.{}.attn.add_q_proj",
            "transformer_blocks.{}.attn.add_k_proj",
            "transformer_blocks.{}.attn.add_v_proj",
        ),
    },
    swap_halves={"final_layer.adaLN_modulation.1": "norm_out.linear"},
)
"""Original names of the transformer's modules, and of norms, whose leaves differ -> documented ones. Of the last
modulation the original has the shift first, diffusers the scale."""

DIT_MODULES = tuple(name for names in DIT_ORIGINAL.rules.values() for name in names if not name.endswith(".weight"))
"""Documented names of all modules of the transformer with a matrix."""

DIT_SIDES = {
    **{f"transformer_blocks.{{}}.{half}.linear_in": (6, 1) for half in ("ff", "ff_context")},
    **{f"transformer_blocks.{{}}.{half}.linear_out": (1, 3) for half in ("ff", "ff_context")},
    "single_transformer_blocks.{}.attn.to_qkv_mlp_proj": (9, 1),
    "single_transformer_blocks.{}.attn.to_out": (1, 4),
}
"""Rows and columns of weights, in multiples of the transformer's width; gated MLPs have 2 x 3 widths."""
DIT_BLOCKS = {"transformer_blocks.": 8, "single_transformer_blocks.": 48}
"""Numbers of blocks of the largest published transformer."""

TEXT_LAYERS = (9, 18, 27)
"""The transformer reads the hidden states after these layers of Qwen3."""

TRANSFORMER_SIGNATURE = frozenset(
    {
        "transformer_blocks.0.attn.add_q_proj.weight",
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight",
        "double_stream_modulation_img.linear.weight",
    }
)
"""Keys of transformers in the diffusers layout."""
TEXT_ENCODER_SIGNATURE = frozenset(
    {
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.mlp.gate_proj.weight",
    }
)
"""Keys of Qwen3."""
VAE_SIGNATURE = frozenset({"encoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.conv1.weight", "bn.running_mean"})
"""Keys of the VAE."""

TRANSFORMER_ORIGINAL_SIGNATURE = frozenset(
    {"double_blocks.0.img_attn.qkv.weight", "double_stream_modulation_img.lin.weight"}
)
"""Keys of transformers in the original layout."""
DEV_TEXT_ENCODER_SIGNATURE = frozenset(
    {"language_model.model.layers.0.self_attn.q_proj.weight", "multi_modal_projector.linear_1.weight"}
)
"""Keys of the text encoder of FLUX.2-dev, Mistral 3, in published files."""
DEV_TEXT_ENCODER_MODULE_SIGNATURE = frozenset(
    {"model.language_model.layers.0.self_attn.q_proj.weight", "model.multi_modal_projector.linear_1.weight"}
)
"""Files of Mistral 3 have the keys of earlier transformers releases, or current module keys."""

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def unused_in_text_encoder(names: frozenset[str]) -> frozenset[str]:
    """Return the layers after the last one whose hidden states the transformer reads."""
    layers = {int(match[1]) for match in map(_LAYER.match, names) if match}
    later = {f"model.layers.{layer}" for layer in layers if layer >= max(TEXT_LAYERS)}
    return frozenset({"model.norm", "lm_head", *later})


def unused_in_vae(names: frozenset[str]) -> frozenset[str]:
    """Return the decoder, which training does not use, and the latent statistics, which are constants."""
    return frozenset({"decoder", "post_quant_conv", "bn"})

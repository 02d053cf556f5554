"""Names of FLUX.2's tensors and modules. No torch.

Files, documented names and modules agree: they are those of diffusers (transformer, VAE) and transformers (Qwen3).
"""

import re

LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "linear_in", "linear_out", "to_qkv_mlp_proj", "to_out",
)  # fmt: skip
"""The documented `lora_target_modules` of the transformer.

Recipes name the last one block by block, `single_transformer_blocks.N.attn.to_out`. As an ending it addresses the same
modules: what the double blocks call `to_out` is a list, whose first is `to_out.0`.
"""

TEXT_LAYERS = (9, 18, 27)
"""The transformer reads what has passed through as many layers of Qwen3."""

TRANSFORMER_SIGNATURE = frozenset(
    {
        "transformer_blocks.0.attn.add_q_proj.weight",
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight",
        "double_stream_modulation_img.linear.weight",
    }
)
TEXT_ENCODER_SIGNATURE = frozenset(
    {
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.mlp.gate_proj.weight",
    }
)
VAE_SIGNATURE = frozenset({"encoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.conv1.weight", "bn.running_mean"})

TRANSFORMER_ORIGINAL_SIGNATURE = frozenset(
    {"double_blocks.0.img_attn.qkv.weight", "double_stream_modulation_img.lin.weight"}
)
DEV_TEXT_ENCODER_SIGNATURE = frozenset(
    {"language_model.model.layers.0.self_attn.q_proj.weight", "multi_modal_projector.linear_1.weight"}
)
DEV_TEXT_ENCODER_MODULE_SIGNATURE = frozenset(
    {"model.language_model.layers.0.self_attn.q_proj.weight", "model.multi_modal_projector.linear_1.weight"}
)
"""Files of Mistral 3 carry names of earlier transformers releases, or those of today's module."""

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def unused_in_text_encoder(names: frozenset[str]) -> frozenset[str]:
    """Nothing reads what stands behind the last layer whose states the transformer is given."""
    layers = {int(match[1]) for match in map(_LAYER.match, names) if match}
    behind = {f"model.layers.{layer}" for layer in layers if layer >= max(TEXT_LAYERS)}
    return frozenset({"model.norm", "lm_head", *behind})


def unused_in_vae(names: frozenset[str]) -> frozenset[str]:
    """Training reads latents, so nothing is decoded, and the statistics of latents are constants."""
    return frozenset({"decoder", "post_quant_conv", "bn"})

"""Keys of FLUX.1's tensors and modules. No torch.

There are three sets of keys. Original: `flux1-dev.safetensors`, `ae.safetensors`; source black-forest-labs/flux,
src/flux/{model,modules/layers,modules/autoencoder}.py. Documented, which users type and LoRA files contain, for the
transformer: source modelscope/DiffSynth-Studio, diffsynth/models/flux_dit.py. Module keys: those of diffusers and
transformers.
"""

from diffsynth_core.models.control import count_added
from diffsynth_core.models.shapes import count_blocks
from diffsynth_core.weights.key_maps import ComposedKeyMap, PrefixMap, TableMap

LORA_TARGETS = (
    "a_to_qkv", "b_to_qkv", "ff_a.0", "ff_a.2", "ff_b.0", "ff_b.2", "a_to_out", "b_to_out",
    "proj_out", "norm.linear", "norm1_a.linear", "norm1_b.linear", "to_qkv_mlp",
)  # fmt: skip
"""The documented `lora_target_modules` of the transformer."""

DIT_ORIGINAL = TableMap(
    {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "double_blocks.{}.img_mod.lin": "transformer_blocks.{}.norm1.linear",
        "double_blocks.{}.img_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_q.weight",
        "double_blocks.{}.img_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_k.weight",
        "double_blocks.{}.img_attn.proj": "transformer_blocks.{}.attn.to_out.0",
        "double_blocks.{}.img_mlp.0": "transformer_blocks.{}.ff.net.0.proj",
        "double_blocks.{}.img_mlp.2": "transformer_blocks.{}.ff.net.2",
        "double_blocks.{}.txt_mod.lin": "transformer_blocks.{}.norm1_context.linear",
        "double_blocks.{}.txt_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_added_q.weight",
        "double_blocks.{}.txt_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_added_k.weight",
        "double_blocks.{}.txt_attn.proj": "transformer_blocks.{}.attn.to_add_out",
        "double_blocks.{}.txt_mlp.0": "transformer_blocks.{}.ff_context.net.0.proj",
        "double_blocks.{}.txt_mlp.2": "transformer_blocks.{}.ff_context.net.2",
        "single_blocks.{}.modulation.lin": "single_transformer_blocks.{}.norm.linear",
        "single_blocks.{}.norm.query_norm.scale": "single_transformer_blocks.{}.attn.norm_q.weight",
        "single_blocks.{}.norm.key_norm.scale": "single_transformer_blocks.{}.attn.norm_k.weight",
        "single_blocks.{}.linear2": "single_transformer_blocks.{}.proj_out",
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
        "single_blocks.{}.linear1": (
            ("single_transformer_blocks.{}.attn.to_q", 1),
            ("single_transformer_blocks.{}.attn.to_k", 1),
            ("single_transformer_blocks.{}.attn.to_v", 1),
            ("single_transformer_blocks.{}.proj_mlp", 4),
        ),
    },
    swap_halves={"final_layer.adaLN_modulation.1": "norm_out.linear"},
)
"""Module keys by original key. In modulations with two parts the original has the shift first, diffusers the scale."""

DIT_DOCUMENTED = TableMap(
    {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_embedder.timestep_embedder.0": "time_in.in_layer",
        "time_embedder.timestep_embedder.2": "time_in.out_layer",
        "pooled_text_embedder.0": "vector_in.in_layer",
        "pooled_text_embedder.2": "vector_in.out_layer",
        "guidance_embedder.timestep_embedder.0": "guidance_in.in_layer",
        "guidance_embedder.timestep_embedder.2": "guidance_in.out_layer",
        "blocks.{}.norm1_a.linear": "double_blocks.{}.img_mod.lin",
        "blocks.{}.attn.a_to_qkv": "double_blocks.{}.img_attn.qkv",
        "blocks.{}.attn.norm_q_a.weight": "double_blocks.{}.img_attn.norm.query_norm.scale",
        "blocks.{}.attn.norm_k_a.weight": "double_blocks.{}.img_attn.norm.key_norm.scale",
        "blocks.{}.attn.a_to_out": "double_blocks.{}.img_attn.proj",
        "blocks.{}.ff_a.0": "double_blocks.{}.img_mlp.0",
        "blocks.{}.ff_a.2": "double_blocks.{}.img_mlp.2",
        "blocks.{}.norm1_b.linear": "double_blocks.{}.txt_mod.lin",
        "blocks.{}.attn.b_to_qkv": "double_blocks.{}.txt_attn.qkv",
        "blocks.{}.attn.norm_q_b.weight": "double_blocks.{}.txt_attn.norm.query_norm.scale",
        "blocks.{}.attn.norm_k_b.weight": "double_blocks.{}.txt_attn.norm.key_norm.scale",
        "blocks.{}.attn.b_to_out": "double_blocks.{}.txt_attn.proj",
        "blocks.{}.ff_b.0": "double_blocks.{}.txt_mlp.0",
        "blocks.{}.ff_b.2": "double_blocks.{}.txt_mlp.2",
        "single_blocks.{}.norm.linear": "single_blocks.{}.modulation.lin",
        "single_blocks.{}.to_qkv_mlp": "single_blocks.{}.linear1",
        "single_blocks.{}.norm_q_a.weight": "single_blocks.{}.norm.query_norm.scale",
        "single_blocks.{}.norm_k_a.weight": "single_blocks.{}.norm.key_norm.scale",
        "single_blocks.{}.proj_out": "single_blocks.{}.linear2",
        "final_norm_out.linear": "final_layer.adaLN_modulation.1",
        "final_proj_out": "final_layer.linear",
    }
)
"""Documented keys -> original keys of the same tensors.

Files of DiffSynth-Studio's first major version have the halves of `final_norm_out.linear` in diffusers' order, which
their keys do not show.
"""

DIT = ComposedKeyMap(DIT_DOCUMENTED, DIT_ORIGINAL)
"""Documented keys -> module keys."""

DIT_MODULES = tuple(name for name in DIT_DOCUMENTED.rules if not name.endswith(".weight"))
"""Documented names of all modules of the transformer with a matrix."""

DIT_SIDES = {
    **{f"blocks.{{}}.norm1_{stream}.linear": (6, 1) for stream in "ab"},
    **{f"blocks.{{}}.attn.{stream}_to_qkv": (3, 1) for stream in "ab"},
    **{f"blocks.{{}}.ff_{stream}.0": (4, 1) for stream in "ab"},
    **{f"blocks.{{}}.ff_{stream}.2": (1, 4) for stream in "ab"},
    "single_blocks.{}.norm.linear": (3, 1),
    "single_blocks.{}.to_qkv_mlp": (7, 1),
    "single_blocks.{}.proj_out": (1, 5),
}
"""Rows and columns of weights, in multiples of the transformer's width."""
DIT_BLOCKS = {"blocks.": 19, "single_blocks.": 38}
"""Numbers of blocks of the largest published transformer."""

_RESIDUAL_BLOCK = ("norm1", "conv1", "norm2", "conv2")
_UP_LEVELS = {3: 0, 2: 1, 1: 2, 0: 3}
"""Level of the decoder in the original (fine to coarse) -> in diffusers (coarse to fine)."""
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

VAE_ORIGINAL = TableMap(
    {
        "encoder.conv_in": "encoder.conv_in",
        **{
            f"encoder.down.{{}}.block.{{}}.{name}": f"encoder.down_blocks.{{}}.resnets.{{}}.{name}"
            for name in _RESIDUAL_BLOCK
        },
        "encoder.down.{}.block.0.nin_shortcut": "encoder.down_blocks.{}.resnets.0.conv_shortcut",
        "encoder.down.{}.downsample.conv": "encoder.down_blocks.{}.downsamplers.0.conv",
        **{
            f"decoder.up.{level}.block.{{}}.{name}": f"decoder.up_blocks.{own_level}.resnets.{{}}.{name}"
            for level, own_level in _UP_LEVELS.items()
            for name in _RESIDUAL_BLOCK
        },
        "decoder.up.2.block.0.nin_shortcut": "decoder.up_blocks.1.resnets.0.conv_shortcut",
        "decoder.up.1.block.0.nin_shortcut": "decoder.up_blocks.2.resnets.0.conv_shortcut",
        "decoder.up.0.block.0.nin_shortcut": "decoder.up_blocks.3.resnets.0.conv_shortcut",
        **{
            f"decoder.up.{level}.upsample.conv": f"decoder.up_blocks.{own_level}.upsamplers.0.conv"
            for level, own_level in _UP_LEVELS.items()
            if level > 0
        },
        **{
            f"{part}.mid.block_{number}.{name}": f"{part}.mid_block.resnets.{number - 1}.{name}"
            for part in ("encoder", "decoder")
            for number in (1, 2)
            for name in _RESIDUAL_BLOCK
        },
        "encoder.mid.attn_1.norm": "encoder.mid_block.attentions.0.group_norm",
        "decoder.mid.attn_1.norm": "decoder.mid_block.attentions.0.group_norm",
        "encoder.norm_out": "encoder.conv_norm_out",
        "encoder.conv_out": "encoder.conv_out",
        "decoder.conv_in": "decoder.conv_in",
        "decoder.norm_out": "decoder.conv_norm_out",
        "decoder.conv_out": "decoder.conv_out",
    },
    pointwise={
        f"{part}.mid.attn_1.{theirs}": f"{part}.mid_block.attentions.0.{ours}"
        for part in ("encoder", "decoder")
        for theirs, ours in _ATTENTION.items()
    },
)
"""Module keys by original key. A shortcut exists only where the width changes."""

CLIP = PrefixMap(("text_model.", ""))
"""Files of CLIP's text model have a level more than the current module; files saved by that may lack it."""

T5 = TableMap(
    {
        name: name
        for name in (
            "shared",
            "encoder.block.{}.layer.{}.layer_norm",
            "encoder.block.{}.layer.0.SelfAttention.q",
            "encoder.block.{}.layer.0.SelfAttention.k",
            "encoder.block.{}.layer.0.SelfAttention.v",
            "encoder.block.{}.layer.0.SelfAttention.o",
            "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias",
            "encoder.block.{}.layer.1.DenseReluDense.wi_0",
            "encoder.block.{}.layer.1.DenseReluDense.wi_1",
            "encoder.block.{}.layer.1.DenseReluDense.wo",
            "encoder.final_layer_norm",
        )
    },
    ignored=("encoder.embed_tokens",),
)
"""Module keys, without the second key of `shared.weight`, which some files contain too."""

DIT_ORIGINAL_SIGNATURE = frozenset(
    {
        "double_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.img_mod.lin.weight",
        "single_blocks.0.modulation.lin.weight",
        "vector_in.in_layer.weight",
    }
)
"""Keys of transformers in the original layout."""
DIT_DIFFUSERS_SIGNATURE = frozenset(
    {
        "transformer_blocks.0.norm1_context.linear.weight",
        "single_transformer_blocks.0.norm.linear.weight",
        "time_text_embed.text_embedder.linear_1.weight",
        "context_embedder.weight",
        "proj_out.weight",
    }
)
"""Keys of transformers in the diffusers layout."""
DIT_DOCUMENTED_SIGNATURE = frozenset(
    {"blocks.0.attn.a_to_qkv.weight", "single_blocks.0.to_qkv_mlp.weight", "final_proj_out.weight"}
)
"""Keys of transformers with documented names."""
VAE_ORIGINAL_SIGNATURE = frozenset(
    {"encoder.down.0.block.0.norm1.weight", "encoder.mid.attn_1.q.weight", "decoder.up.0.block.0.norm1.weight"}
)
"""Keys of VAEs in the original layout."""
VAE_DIFFUSERS_SIGNATURE = frozenset(
    {
        "encoder.down_blocks.0.resnets.0.norm1.weight",
        "encoder.mid_block.attentions.0.to_q.weight",
        "decoder.up_blocks.0.resnets.0.norm1.weight",
    }
)
"""Keys of VAEs in the diffusers layout."""
CLIP_SIGNATURE = frozenset({"text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight"})
"""Keys of CLIP's text model."""
CLIP_FLAT_SIGNATURE = frozenset({"embeddings.token_embedding.weight", "final_layer_norm.weight"})
"""Keys of CLIP's text model as saved by the current module."""
T5_SIGNATURE = frozenset({"shared.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"})
"""Keys of T5."""

UMT5_TENSORS = frozenset({"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"})
"""UMT5 has the position bias in each block, T5 only in its first."""
FLUX_2_VAE_TENSORS = frozenset({"bn.running_mean", "bn.running_var"})
"""Keys of FLUX.2's VAE that FLUX.1's lacks."""


CONTROLNET_SIGNATURE = frozenset(
    {"transformer_blocks.0.norm1_context.linear.weight", "controlnet_x_embedder.weight", "controlnet_blocks.0.weight"}
)
"""Keys of ControlNets."""
UNION_TENSORS = frozenset({"controlnet_x_embedder.weight", "controlnet_mode_embedder.weight"})
"""Tensors of ControlNets for several kinds of control images, which require the kind as an input."""
HINT_TENSORS = frozenset({"controlnet_x_embedder.weight", "input_hint_block.conv_in.weight"})
"""Tensors of ControlNets that read pixels instead of latents."""

LAST_TEXT_MODULES = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "ff_context")
"""Modules of the last block that only affect the text stream after it."""


def dead_in_controlnet(names: frozenset[str], blocks: int | None, single_blocks: int | None) -> frozenset[str]:
    """Return the modules of a ControlNet that cannot affect a transformer with these numbers of blocks (None:
    unlimited).

    Single-stream blocks read the output of double-stream blocks; without them, the text stream ends with the last
    block in use.
    """
    double, single = (count_blocks(names, f"{kind}transformer_blocks.") for kind in ("", "single_"))
    used = double if blocks is None else count_added(double, blocks)
    used_single = single if single_blocks is None else count_added(single, single_blocks)
    dead = {f"controlnet_blocks.{block}" for block in range(used, double)}
    for block in range(used_single, single):
        dead |= {f"controlnet_single_blocks.{block}", f"single_transformer_blocks.{block}"}
    if not used_single:
        dead |= {f"transformer_blocks.{block}" for block in range(used, double)}
        dead |= {f"transformer_blocks.{used - 1}.{module}" for module in LAST_TEXT_MODULES if used}
    return frozenset(dead)


def unused_in_vae(names: frozenset[str]) -> frozenset[str]:
    """Return the decoder: training reads latents, so nothing is decoded."""
    return frozenset({"decoder", "post_quant_conv"})

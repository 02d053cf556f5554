"""Keys of Wan's tensors and modules. No torch.

The documented names are Wan's own, as in `diffusion_pytorch_model*.safetensors`, `models_t5_*.pth`, `Wan2.1_VAE.pth`,
`Wan2.2_VAE.pth` and `models_clip_*.pth`. Module keys are those of diffusers and transformers. Sources:
Wan-Video/Wan2.1 and Wan2.2, wan/modules/{model,t5,vae,vae2_2,clip}.py.
"""

import re

from diffsynth_core.weights.key_maps import PrefixMap, TableMap

LORA_TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")
"""The documented `lora_target_modules` of the transformer, in Wan's own names."""

DIT = TableMap(
    {
        "patch_embedding": "patch_embedding",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
        "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
        "blocks.{}.modulation": "blocks.{}.scale_shift_table",
        "blocks.{}.self_attn.q": "blocks.{}.attn1.to_q",
        "blocks.{}.self_attn.k": "blocks.{}.attn1.to_k",
        "blocks.{}.self_attn.v": "blocks.{}.attn1.to_v",
        "blocks.{}.self_attn.o": "blocks.{}.attn1.to_out.0",
        "blocks.{}.self_attn.norm_q": "blocks.{}.attn1.norm_q",
        "blocks.{}.self_attn.norm_k": "blocks.{}.attn1.norm_k",
        "blocks.{}.norm3": "blocks.{}.norm2",
        "blocks.{}.cross_attn.q": "blocks.{}.attn2.to_q",
        "blocks.{}.cross_attn.k": "blocks.{}.attn2.to_k",
        "blocks.{}.cross_attn.v": "blocks.{}.attn2.to_v",
        "blocks.{}.cross_attn.o": "blocks.{}.attn2.to_out.0",
        "blocks.{}.cross_attn.norm_q": "blocks.{}.attn2.norm_q",
        "blocks.{}.cross_attn.norm_k": "blocks.{}.attn2.norm_k",
        "blocks.{}.cross_attn.k_img": "blocks.{}.attn2.add_k_proj",
        "blocks.{}.cross_attn.v_img": "blocks.{}.attn2.add_v_proj",
        "blocks.{}.cross_attn.norm_k_img": "blocks.{}.attn2.norm_added_k",
        "blocks.{}.ffn.0": "blocks.{}.ffn.net.0.proj",
        "blocks.{}.ffn.2": "blocks.{}.ffn.net.2",
        "head.head": "proj_out",
        "head.modulation": "scale_shift_table",
    }
)
"""`norm3` of Wan, before cross-attention, is `norm2` of diffusers; the other norms of a block have no weights."""

_WITHOUT_MATRIX = (
    "norm3",
    "norm_q",
    "norm_k",
    "norm_k_img",
    "modulation",
    "emb_pos",
    "img_emb.proj.0",
    "img_emb.proj.4",
)

DIT_MODULES = tuple(name for name in DIT.rules if not name.endswith(_WITHOUT_MATRIX))
"""Documented names of all modules of the transformer with a matrix or a convolution."""

TEXT_ENCODER = TableMap(
    {
        "token_embedding": "shared",
        "blocks.{}.norm1": "encoder.block.{}.layer.0.layer_norm",
        "blocks.{}.attn.q": "encoder.block.{}.layer.0.SelfAttention.q",
        "blocks.{}.attn.k": "encoder.block.{}.layer.0.SelfAttention.k",
        "blocks.{}.attn.v": "encoder.block.{}.layer.0.SelfAttention.v",
        "blocks.{}.attn.o": "encoder.block.{}.layer.0.SelfAttention.o",
        "blocks.{}.pos_embedding.embedding": "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias",
        "blocks.{}.norm2": "encoder.block.{}.layer.1.layer_norm",
        "blocks.{}.ffn.gate.0": "encoder.block.{}.layer.1.DenseReluDense.wi_0",
        "blocks.{}.ffn.fc1": "encoder.block.{}.layer.1.DenseReluDense.wi_1",
        "blocks.{}.ffn.fc2": "encoder.block.{}.layer.1.DenseReluDense.wo",
        "norm": "encoder.final_layer_norm",
    }
)
"""`encoder.embed_tokens.weight` of the module is tied to `shared.weight`: files in Wan's own layout lack it."""

VAE_OUTER = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    "encoder.conv1": "encoder.conv_in",
    "encoder.middle.0.residual.0": "encoder.mid_block.resnets.0.norm1",
    "encoder.middle.0.residual.2": "encoder.mid_block.resnets.0.conv1",
    "encoder.middle.0.residual.3": "encoder.mid_block.resnets.0.norm2",
    "encoder.middle.0.residual.6": "encoder.mid_block.resnets.0.conv2",
    "encoder.middle.1.norm": "encoder.mid_block.attentions.0.norm",
    "encoder.middle.1.to_qkv": "encoder.mid_block.attentions.0.to_qkv",
    "encoder.middle.1.proj": "encoder.mid_block.attentions.0.proj",
    "encoder.middle.2.residual.0": "encoder.mid_block.resnets.1.norm1",
    "encoder.middle.2.residual.2": "encoder.mid_block.resnets.1.conv1",
    "encoder.middle.2.residual.3": "encoder.mid_block.resnets.1.norm2",
    "encoder.middle.2.residual.6": "encoder.mid_block.resnets.1.conv2",
    "encoder.head.0": "encoder.norm_out",
    "encoder.head.2": "encoder.conv_out",
    "decoder.conv1": "decoder.conv_in",
    "decoder.middle.0.residual.0": "decoder.mid_block.resnets.0.norm1",
    "decoder.middle.0.residual.2": "decoder.mid_block.resnets.0.conv1",
    "decoder.middle.0.residual.3": "decoder.mid_block.resnets.0.norm2",
    "decoder.middle.0.residual.6": "decoder.mid_block.resnets.0.conv2",
    "decoder.middle.1.norm": "decoder.mid_block.attentions.0.norm",
    "decoder.middle.1.to_qkv": "decoder.mid_block.attentions.0.to_qkv",
    "decoder.middle.1.proj": "decoder.mid_block.attentions.0.proj",
    "decoder.middle.2.residual.0": "decoder.mid_block.resnets.1.norm1",
    "decoder.middle.2.residual.2": "decoder.mid_block.resnets.1.conv1",
    "decoder.middle.2.residual.3": "decoder.mid_block.resnets.1.norm2",
    "decoder.middle.2.residual.6": "decoder.mid_block.resnets.1.conv2",
    "decoder.head.0": "decoder.norm_out",
    "decoder.head.2": "decoder.conv_out",
}
"""What both VAEs share: everything but the levels between `conv1` and `middle`, and between `middle` and `head`."""

VAE_2_1_UP_BLOCKS = {
    "decoder.upsamples.0": "decoder.up_blocks.0.resnets.0",
    "decoder.upsamples.1": "decoder.up_blocks.0.resnets.1",
    "decoder.upsamples.2": "decoder.up_blocks.0.resnets.2",
    "decoder.upsamples.4": "decoder.up_blocks.1.resnets.0",
    "decoder.upsamples.5": "decoder.up_blocks.1.resnets.1",
    "decoder.upsamples.6": "decoder.up_blocks.1.resnets.2",
    "decoder.upsamples.8": "decoder.up_blocks.2.resnets.0",
    "decoder.upsamples.9": "decoder.up_blocks.2.resnets.1",
    "decoder.upsamples.10": "decoder.up_blocks.2.resnets.2",
    "decoder.upsamples.12": "decoder.up_blocks.3.resnets.0",
    "decoder.upsamples.13": "decoder.up_blocks.3.resnets.1",
    "decoder.upsamples.14": "decoder.up_blocks.3.resnets.2",
}
"""Wan numbers residual blocks and upsamplers of all levels consecutively; diffusers numbers them per level."""

RESIDUAL_BLOCK = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
"""Modules of a residual block of the VAE."""

VAE_2_1 = TableMap(
    {
        **VAE_OUTER,
        "encoder.downsamples.{}.residual.0": "encoder.down_blocks.{}.norm1",
        "encoder.downsamples.{}.residual.2": "encoder.down_blocks.{}.conv1",
        "encoder.downsamples.{}.residual.3": "encoder.down_blocks.{}.norm2",
        "encoder.downsamples.{}.residual.6": "encoder.down_blocks.{}.conv2",
        "encoder.downsamples.{}.shortcut": "encoder.down_blocks.{}.conv_shortcut",
        "encoder.downsamples.{}.resample.1": "encoder.down_blocks.{}.resample.1",
        "encoder.downsamples.{}.time_conv": "encoder.down_blocks.{}.time_conv",
        **{
            f"{theirs}.{part}": f"{ours}.{our_part}"
            for theirs, ours in VAE_2_1_UP_BLOCKS.items()
            for part, our_part in RESIDUAL_BLOCK.items()
        },
        "decoder.upsamples.4.shortcut": "decoder.up_blocks.1.resnets.0.conv_shortcut",
        "decoder.upsamples.3.resample.1": "decoder.up_blocks.0.upsamplers.0.resample.1",
        "decoder.upsamples.3.time_conv": "decoder.up_blocks.0.upsamplers.0.time_conv",
        "decoder.upsamples.7.resample.1": "decoder.up_blocks.1.upsamplers.0.resample.1",
        "decoder.upsamples.7.time_conv": "decoder.up_blocks.1.upsamplers.0.time_conv",
        "decoder.upsamples.11.resample.1": "decoder.up_blocks.2.upsamplers.0.resample.1",
    }
)
"""Documented keys of the VAE of Wan 2.1 -> module keys."""

VAE_2_2 = TableMap(
    {
        **VAE_OUTER,
        "encoder.downsamples.{}.downsamples.{}.residual.0": "encoder.down_blocks.{}.resnets.{}.norm1",
        "encoder.downsamples.{}.downsamples.{}.residual.2": "encoder.down_blocks.{}.resnets.{}.conv1",
        "encoder.downsamples.{}.downsamples.{}.residual.3": "encoder.down_blocks.{}.resnets.{}.norm2",
        "encoder.downsamples.{}.downsamples.{}.residual.6": "encoder.down_blocks.{}.resnets.{}.conv2",
        "encoder.downsamples.{}.downsamples.{}.shortcut": "encoder.down_blocks.{}.resnets.{}.conv_shortcut",
        "encoder.downsamples.{}.downsamples.2.resample.1": "encoder.down_blocks.{}.downsampler.resample.1",
        "encoder.downsamples.{}.downsamples.2.time_conv": "encoder.down_blocks.{}.downsampler.time_conv",
        "decoder.upsamples.{}.upsamples.{}.residual.0": "decoder.up_blocks.{}.resnets.{}.norm1",
        "decoder.upsamples.{}.upsamples.{}.residual.2": "decoder.up_blocks.{}.resnets.{}.conv1",
        "decoder.upsamples.{}.upsamples.{}.residual.3": "decoder.up_blocks.{}.resnets.{}.norm2",
        "decoder.upsamples.{}.upsamples.{}.residual.6": "decoder.up_blocks.{}.resnets.{}.conv2",
        "decoder.upsamples.{}.upsamples.{}.shortcut": "decoder.up_blocks.{}.resnets.{}.conv_shortcut",
        "decoder.upsamples.{}.upsamples.3.resample.1": "decoder.up_blocks.{}.upsampler.resample.1",
        "decoder.upsamples.{}.upsamples.3.time_conv": "decoder.up_blocks.{}.upsampler.time_conv",
    }
)
"""Documented keys of the VAE of Wan 2.2 -> module keys."""

IMAGE_ENCODER = TableMap(
    {
        "visual.patch_embedding": "embeddings.patch_embedding",
        "visual.pre_norm": "pre_layrnorm",
        "visual.transformer.{}.norm1": "encoder.layers.{}.layer_norm1",
        "visual.transformer.{}.attn.proj": "encoder.layers.{}.self_attn.out_proj",
        "visual.transformer.{}.norm2": "encoder.layers.{}.layer_norm2",
        "visual.transformer.{}.mlp.0": "encoder.layers.{}.mlp.fc1",
        "visual.transformer.{}.mlp.2": "encoder.layers.{}.mlp.fc2",
        "visual.post_norm": "post_layernorm",
    },
    fused={
        "visual.transformer.{}.attn.to_qkv": (
            "encoder.layers.{}.self_attn.q_proj",
            "encoder.layers.{}.self_attn.k_proj",
            "encoder.layers.{}.self_attn.v_proj",
        )
    },
    unsqueezed={
        "visual.cls_embedding": ("embeddings.class_embedding", 2),
        "visual.pos_embedding": ("embeddings.position_embedding.weight", 1),
    },
    ignored=("visual.head", "textual", "log_scale"),
)
"""The vision model of CLIP; its projection, the text model and the logit scale are not read."""

IMAGE_ENCODER_DIFFUSERS = PrefixMap(("vision_model.", ""))
"""Files of diffusers repositories come from transformers releases with one more level above the vision model."""

DIT_ORIGINAL_SIGNATURE = frozenset(
    {"blocks.0.self_attn.q.weight", "blocks.0.cross_attn.norm_k.weight", "head.modulation"}
)
"""Keys of transformers in Wan's own layout."""
DIT_DIFFUSERS_SIGNATURE = frozenset(
    {"blocks.0.attn1.to_q.weight", "blocks.0.attn2.norm_k.weight", "condition_embedder.time_proj.weight"}
)
"""Keys of transformers in the diffusers layout."""
TEXT_ENCODER_ORIGINAL_SIGNATURE = frozenset(
    {"token_embedding.weight", "blocks.0.pos_embedding.embedding.weight", "blocks.0.ffn.gate.0.weight"}
)
"""Keys of text encoders in Wan's own layout."""
TEXT_ENCODER_DIFFUSERS_SIGNATURE = frozenset(
    {
        "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
    }
)
"""T5 has the position bias only in its first block, UMT5 in each."""
VAE_2_1_ORIGINAL_SIGNATURE = frozenset(
    {"encoder.downsamples.0.residual.0.gamma", "encoder.conv1.weight", "conv2.weight"}
)
"""Keys of VAEs of Wan 2.1 in Wan's own layout."""
VAE_2_1_DIFFUSERS_SIGNATURE = frozenset(
    {"encoder.down_blocks.0.norm1.gamma", "encoder.conv_in.weight", "post_quant_conv.weight"}
)
"""Keys of VAEs of Wan 2.1 in the diffusers layout."""
VAE_2_2_ORIGINAL_SIGNATURE = frozenset(
    {"encoder.downsamples.0.downsamples.0.residual.0.gamma", "encoder.conv1.weight", "conv2.weight"}
)
"""Keys of VAEs of Wan 2.2 in Wan's own layout."""
VAE_2_2_DIFFUSERS_SIGNATURE = frozenset(
    {"encoder.down_blocks.0.resnets.0.norm1.gamma", "encoder.conv_in.weight", "post_quant_conv.weight"}
)
"""Keys of VAEs of Wan 2.2 in the diffusers layout."""
IMAGE_ENCODER_ORIGINAL_SIGNATURE = frozenset(
    {"visual.cls_embedding", "visual.pos_embedding", "visual.transformer.0.attn.to_qkv.weight"}
)
"""Keys of image encoders in Wan's own layout."""
IMAGE_ENCODER_DIFFUSERS_SIGNATURE = frozenset(
    {"vision_model.embeddings.class_embedding", "vision_model.pre_layrnorm.weight"}
)
"""Keys of image encoders in the diffusers layout."""
IMAGE_ENCODER_FLAT_SIGNATURE = frozenset({"embeddings.class_embedding", "pre_layrnorm.weight"})
"""Current module keys: those of files without the level `vision_model`."""

_LAYER = re.compile(r"^encoder\.layers\.(\d+)\.")


def unused_in_vae(names: frozenset[str]) -> frozenset[str]:
    """Return the decoder: training reads latents, so nothing is decoded."""
    return frozenset({"decoder", "post_quant_conv"})


def unused_in_image_encoder(names: frozenset[str]) -> frozenset[str]:
    """Return the last layer: the transformer reads CLIP's states before it (`hidden_states[-2]`)."""
    layers = [int(match[1]) for match in map(_LAYER.match, names) if match]
    return frozenset({"post_layernorm", *({f"encoder.layers.{max(layers)}"} if layers else ())})

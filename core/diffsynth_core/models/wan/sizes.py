"""Sizes of Wan's published models, for when their files are not there. No torch."""

import math

from diffsynth_core.models.size_facts import HubModelSize

FRAMES_PER_LATENT = 4
"""Frames of a clip in one latent frame; the first latent frame holds one."""
FRAMES = {"input_image": 0, "end_image": -1}
"""Extra inputs: the first and the last frame of the clip, as conditions."""
IMAGE_TOKENS = 257
"""Of one image shown to the image encoder."""
EMBEDDER = "condition_embedder"
FP32_MODULES = frozenset({"rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"})
"""Parts whose weights diffusers keeps in float32 (`_keep_in_fp32_modules` of `WanTransformer3DModel`)."""
LARGEST_HEAD_SIZE = 128
"""Size of an attention head of every published transformer: shapes give only heads times size."""


def head_size(width: int) -> int:
    """Of a transformer of `width` channels: 128 where it divides them, else the largest power of two that does."""
    return math.gcd(width, LARGEST_HEAD_SIZE)


BASE = {
    "patch_size": [1, 2, 2],
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
}
SMALL = {**BASE, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
MEDIUM = {**BASE, "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
LARGE = {**BASE, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
SHOWN_LATENTS = {"in_channels": 36}
"""With the latents and the mask of the frames that are shown."""
IMAGE_SMALL = {**SHOWN_LATENTS, "image_dim": 1280, "added_kv_proj_dim": 1536}
IMAGE_LARGE = {**SHOWN_LATENTS, "image_dim": 1280, "added_kv_proj_dim": 5120}
"""With the states of CLIP as well."""
UMT5 = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
CLIP = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "hidden_act": "gelu",
}
VAE_2_1: dict[str, object] = {}
"""The defaults of `AutoencoderKLWan`."""
VAE_2_2 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
"""But for the statistics of its latents."""
PUBLISHED = (
    HubModelSize("dit", "*T2V-1.3B:*", 1_418_996_800, "float32", SMALL),
    HubModelSize("dit", "*Wan2.1-I2V-14B*:*", 16_394_878_784, "bfloat16", LARGE | IMAGE_LARGE),
    HubModelSize(
        "dit",
        "*Wan2.1-FLF2V-14B*:*",
        16_395_536_704,
        "bfloat16",
        LARGE | IMAGE_LARGE | {"pos_embed_seq_len": 514},
    ),
    HubModelSize("dit", "*Wan2.2-I2V-A14B:*", 14_288_901_184, "bfloat16", LARGE | SHOWN_LATENTS),
    HubModelSize("dit", "*Wan2.2-Fun-A14B-InP:*", 14_288_901_184, "bfloat16", LARGE | SHOWN_LATENTS),
    HubModelSize("dit", "*Wan2.1-Fun-*14B-InP:*", 16_394_878_784, "bfloat16", LARGE | IMAGE_LARGE),
    HubModelSize("dit", "*Wan2.1-Fun-*1.3B-InP:*", 1_564_428_608, "bfloat16", SMALL | IMAGE_SMALL),
    HubModelSize("dit", "*TI2V-5B:*", 4_999_787_712, "bfloat16", MEDIUM),
    HubModelSize("dit", "*T2V*14B:*", 14_288_491_584, "bfloat16", LARGE),
    HubModelSize("text_encoder", "*", 5_680_910_336, "bfloat16", UMT5),
    HubModelSize("vae", "*Wan2.2_VAE*", 704_688_668, "float32", VAE_2_2),
    HubModelSize("vae", "*", 126_892_531, "float32", VAE_2_1),
    HubModelSize("image_encoder", "*", 632_076_801, "bfloat16", CLIP),
)

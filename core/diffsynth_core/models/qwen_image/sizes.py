"""Sizes of Qwen-Image's published models, for when their files are not there. No torch."""

from diffsynth_core.models.size_facts import HubModelSize

TRANSFORMER = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": [16, 56, 56],
}
TEXT_ENCODER = {
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "tie_word_embeddings": False,
}
VAE: dict[str, object] = {}
"""The defaults of `AutoencoderKLQwenImage`."""
PUBLISHED = (
    HubModelSize("dit", "*", 20_430_401_088, "bfloat16", TRANSFORMER),
    HubModelSize("text_encoder", "*", 8_292_166_656, "bfloat16", TEXT_ENCODER),
    HubModelSize("vae", "*", 126_892_531, "bfloat16", VAE),
)

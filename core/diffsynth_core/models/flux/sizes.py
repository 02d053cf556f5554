"""Sizes of FLUX.1's published models, for when their files are not there. No torch."""

from diffsynth_core.models.size_facts import HubModelSize

TRANSFORMER = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
CONTROLNET = {**TRANSFORMER, "num_layers": 5, "num_single_layers": 0}
CLIP = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
T5 = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
PUBLISHED = (
    HubModelSize("dit", "*", 11_901_408_320, "bfloat16", TRANSFORMER),
    HubModelSize("text_encoder_1", "*", 123_060_480, "bfloat16", CLIP),
    HubModelSize("text_encoder_2", "*", 4_762_310_656, "bfloat16", T5),
    HubModelSize("vae", "*", 83_819_683, "float32", VAE),
    HubModelSize("controlnet", "jasperai/Flux.1-dev-Controlnet-*:*", 1_791_605_248, "bfloat16", CONTROLNET),
)

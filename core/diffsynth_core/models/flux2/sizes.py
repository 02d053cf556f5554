"""Sizes of FLUX.2's published models, for when their files are not there. No torch."""

from diffsynth_core.models.size_facts import HubModelSize

TRANSFORMER_4B = {
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32],
    "guidance_embeds": False,
}
TRANSFORMER_9B = {
    **TRANSFORMER_4B,
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}
QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "head_dim": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
QWEN3_8B = {**QWEN3_4B, "hidden_size": 4096, "intermediate_size": 12288}
VAE: dict[str, object] = {}
"""The defaults of `AutoencoderKLFlux2`."""
PUBLISHED = (
    HubModelSize("dit", "*-9B:*", 9_078_581_248, "bfloat16", TRANSFORMER_9B),
    HubModelSize("dit", "*", 3_875_544_576, "bfloat16", TRANSFORMER_4B),
    HubModelSize("text_encoder", "*-9B:*", 7_568_405_504, "bfloat16", QWEN3_8B),
    HubModelSize("text_encoder", "*", 4_022_468_096, "bfloat16", QWEN3_4B),
    HubModelSize("vae", "*", 84_046_115, "bfloat16", VAE),
)

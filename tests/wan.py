"""Wan's tiny models in the layout of their repositories, by the names of their files."""

T2V, I2V, TI2V = "Wan-AI/Wan2.1-T2V-1.3B", "Wan-AI/Wan2.1-I2V-14B-480P", "Wan-AI/Wan2.2-TI2V-5B"
EXPERTS = "Wan-AI/Wan2.2-T2V-A14B"
TEXT = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
DIT = "diffusion_pytorch_model*.safetensors"
PLACES = {
    T2V: {"dit": DIT, "text_encoder": TEXT, "vae": "Wan2.1_VAE.pth"},
    I2V: {"dit": DIT, "text_encoder": TEXT, "vae": "Wan2.1_VAE.pth", "image_encoder": CLIP},
    TI2V: {"dit": DIT, "text_encoder": TEXT, "vae": "Wan2.2_VAE.pth"},
    EXPERTS: {
        "dit": f"high_noise_model/{DIT}",
        "low-noise dit": f"low_noise_model/{DIT}",
        "text_encoder": TEXT,
        "vae": "Wan2.1_VAE.pth",
    },
}


def entries(model_id: str, **other: str | None) -> tuple[str, str]:
    """Return the flag that names the files of a model, with some replaced or removed."""
    named = {component: f"{model_id}:{place}" for component, place in PLACES[model_id].items()} | other
    return "--model_id_with_origin_paths", ",".join(entry for entry in named.values() if entry)

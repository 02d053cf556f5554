"""What Qwen-Image is made of. No torch."""

from diffsynth_core.families.interface import ComponentFacts, EncoderFacts, FamilyFacts, TokenizerFacts
from diffsynth_core.families.qwen_image.names import (
    LORA_TARGETS,
    dead_modules,
    text_encoder_key,
    unused_in_text_encoder,
    unused_in_vae,
)

QWEN_IMAGE = FamilyFacts(
    name="qwen-image",
    title="Qwen-Image",
    model_ids=("Qwen/Qwen-Image*", "DiffSynth-Studio/Qwen-Image*", "FireRedTeam/FireRed-Image*"),
    components=(
        ComponentFacts(
            name="dit",
            title="diffusion transformer",
            signatures=(frozenset({"transformer_blocks.0.img_mod.1.weight", "txt_norm.weight", "img_in.weight"}),),
            places=("transformer/*", "diffusion_pytorch_model*"),
            lora_targets=LORA_TARGETS,
            untrainable=dead_modules,
        ),
        ComponentFacts(
            name="text_encoder",
            title="text encoder Qwen2.5-VL",
            signatures=(
                frozenset({"model.embed_tokens.weight", "visual.patch_embed.proj.weight"}),
                frozenset({"model.language_model.embed_tokens.weight", "model.visual.patch_embed.proj.weight"}),
            ),
            places=("text_encoder/*",),
            module_key=text_encoder_key,
            untrainable=unused_in_text_encoder,
        ),
        ComponentFacts(
            name="vae",
            title="VAE",
            signatures=(frozenset({"encoder.conv_in.weight", "encoder.norm_out.gamma", "post_quant_conv.weight"}),),
            places=("vae/*",),
            untrainable=unused_in_vae,
        ),
    ),
    denoiser="dit",
    encoders=(
        EncoderFacts(name="text", component="text_encoder", columns=("prompt",)),
        EncoderFacts(name="latents", component="vae", columns=("image",)),
    ),
    text_column="prompt",
    media_columns=("image",),
    size_factor=16,
    tokenizers={"tokenizer_path": TokenizerFacts("text_encoder", "tokenizer", "Qwen/Qwen-Image:tokenizer")},
)

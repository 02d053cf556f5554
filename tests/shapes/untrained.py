"""The parts of the tiny model before training: random transformer, random frozen text encoder, tokenizer, sampler."""

from pathlib import Path

from diffsynth_core.models.qwen_image.sampling import SCHEDULER
from diffsynth_core.models.qwen_image.tiny import TEMPLATE_WORDS, TinySizes, write_tiny_weights
from diffsynth_core.models.tiny import write_json
from tests.shapes.scenes import COLORS, SHAPES

MODEL_ID = "diffsynth/shapes"
"""As recipes name the model."""
FILES = {
    "dit": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
"""Component -> its weights, below the folder of the model."""
CAPTION_WORDS = tuple(f" {word}" for word in (*COLORS, *SHAPES, "on", "left", "above"))
"""Words of captions that the template has not, with the space before them; the first of each, "a", is a letter."""
SIZES = TinySizes(blocks=4, heads=4, head_size=24, text_width=64, words=(*TEMPLATE_WORDS, *CAPTION_WORDS))
"""Of 1.41 million numbers in the transformer, 0.24 million in the text encoder."""
PIPELINE = {
    "_class_name": "QwenImagePipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}
"""The model_index.json."""


def write_untrained(base: Path) -> None:
    """Write everything but the VAE below `base`/diffsynth/shapes, as a diffusers pipeline."""
    for component in ("dit", "text_encoder"):
        write_tiny_weights(base, component, MODEL_ID, FILES[component], SIZES)
    folder = base / MODEL_ID
    write_json(folder / "model_index.json", PIPELINE)
    (folder / "scheduler").mkdir()
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", **SCHEDULER}
    write_json(folder / "scheduler" / "scheduler_config.json", config)

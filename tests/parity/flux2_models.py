"""Tiny FLUX.2 klein models and images for them: loaded by us, and by diffusers' pipeline from the same files."""

import json
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from torch import Tensor

from diffsynth_core.models.registry import load_family
from tests.parity import models
from tests.parity.models import Ours
from tests.parity.photographs import photograph, pixels_of

PLACES = {
    "dit": "transformer/*.safetensors",
    "text_encoder": "text_encoder/*.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
MODEL_IDS = {"4B": "black-forest-labs/FLUX.2-klein-4B", "base 9B": "black-forest-labs/FLUX.2-klein-base-9B"}
"""4B is distilled and ties its text encoder's output head to the embedding; base 9B is and does neither."""
SINGLE_BLOCKS = {"4B": 20, "base 9B": 24}
PROMPT = "an astronaut before a flag, 漢字"
find_files = partial(models.find_files, "flux2")
load_files = partial(models.load_files, "flux2")
SIZE = (48, 80)
"""Height and width of the target in pixels."""
REFERENCE_SIZES = ((64, 96), (112, 64))
"""Height and width of the two reference images; the pipeline accepts none below 64."""
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
"""The published scheduler configuration of FLUX.2."""


def entries_of(name: str) -> dict[str, str]:
    """Return component -> file of a model in its repository."""
    return {component: f"{MODEL_IDS[name]}:{place}" for component, place in PLACES.items()}


def write_models(base: Path) -> None:
    """Write both models, and the files that diffusers requires to load a repository as a pipeline."""
    for name in MODEL_IDS:
        for component, entry in entries_of(name).items():
            load_family("flux2").write_tiny_weights(base, component, *entry.split(":"))
        folder = base / MODEL_IDS[name]
        index = {
            "_class_name": "Flux2KleinPipeline",
            "is_distilled": "base" not in name,
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen3ForCausalLM"],
            "tokenizer": ["transformers", "Qwen2TokenizerFast"],
            "transformer": ["diffusers", "Flux2Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLFlux2"],
        }
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER), encoding="utf-8")


def load_pipeline(base: Path, name: str) -> Flux2KleinPipeline:
    """Load the repository with diffusers and transformers, float32.

    Its images are converted to our memory layout: with numpy's channels-last layout, group norms on a CPU use another
    kernel whose error against float64 is 5e-5 or more for latents of up to 8, while ours is 1e-5.
    """
    pipeline = Flux2KleinPipeline.from_pretrained(base / MODEL_IDS[name], dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    preprocess = pipeline.image_processor.preprocess
    pipeline.image_processor.preprocess = lambda *inputs, **named: preprocess(*inputs, **named).contiguous()
    return pipeline


@dataclass(frozen=True)
class Flux2Pair:
    """One model, loaded by both."""

    name: str
    ours: Ours
    pipeline: Any

    @cached_property
    def target(self) -> Image.Image:
        return image_of("astronaut", *SIZE)

    @cached_property
    def shown(self) -> tuple[Image.Image, ...]:
        """Two reference images of different sizes."""
        return tuple(image_of(name, *size) for name, size in zip(("coffee", "rocket"), REFERENCE_SIZES, strict=True))

    def encoded(self, shown: int) -> dict[str, Tensor]:
        """The target, a caption and reference images, encoded by us."""
        sample: dict[str, Any] = {"prompt": PROMPT, "image": pixels_of(self.target)}
        if shown:
            sample["edit_image"] = [pixels_of(image) for image in self.shown[:shown]]
        return self.ours.encode(sample)


def load_pair(base: Path, name: str) -> Flux2Pair:
    return Flux2Pair(
        name,
        models.load_ours(base, entries_of(name).values(), extra_inputs=("edit_image",)),
        load_pipeline(base, name),
    )


def image_of(name: str, height: int, width: int) -> Image.Image:
    """Return a photograph at a size."""
    return photograph(name).resize((width, height), Image.Resampling.LANCZOS)

"""Tiny editing models of Qwen-Image, loaded by us and by diffusers' pipelines from the same files; reference images."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from transformers import BatchFeature, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLImageProcessorPil

from diffsynth_core.models.registry import load_family
from tests.conftest import MODEL_ID, PLACES
from tests.parity import models
from tests.parity.models import Ours
from tests.parity.photographs import photograph


@dataclass(frozen=True)
class Kind:
    """One use of one model: `images` are names of `photograph`."""

    model_id: str
    pipeline: type
    images: tuple[str, ...]

    @property
    def entries(self) -> dict[str, str]:
        """Component -> file, as in recipes: only the transformer is the variant's own."""
        return {name: f"{self.model_id if name == 'dit' else MODEL_ID}:{place}" for name, place in PLACES.items()}


KINDS = {
    "Edit": Kind("Qwen/Qwen-Image-Edit", QwenImageEditPipeline, ("coffee",)),
    "2509, one image": Kind("Qwen/Qwen-Image-Edit-2509", QwenImageEditPlusPipeline, ("coffee",)),
    "2509, two images": Kind("Qwen/Qwen-Image-Edit-2509", QwenImageEditPlusPipeline, ("astronaut", "coffee")),
    "2511, two images": Kind("Qwen/Qwen-Image-Edit-2511", QwenImageEditPlusPipeline, ("coffee", "upright")),
}


def write_models(base: Path) -> None:
    """Write all models in the layout of their repositories."""
    for component, entry in {entry: name for kind in KINDS.values() for name, entry in kind.entries.items()}.items():
        load_family("qwen-image").write_tiny_weights(base, entry, *component.split(":"))


def load_ours(base: Path, kind: Kind, **more: Any) -> Ours:
    return models.load_ours(base, kind.entries.values(), extra_inputs=("edit_image",), **more)


class Processor:
    """What the pipelines use of `Qwen2_5_VLProcessor`, which requires torchvision."""

    def __init__(self, tokenizer: Qwen2Tokenizer, image_processor: Qwen2VLImageProcessorPil) -> None:
        self.tokenizer, self.image_processor = tokenizer, image_processor

    def __call__(self, text: list[str], images: Any, padding: bool, return_tensors: str) -> BatchFeature:
        """Repeat each `<|image_pad|>` for the tokens of its image, in order, and tokenize all texts."""
        shown = self.image_processor(images=images, return_tensors=return_tensors)
        counts = iter((shown["image_grid_thw"].prod(dim=-1) // self.image_processor.merge_size**2).tolist())
        expanded = []
        for one in text:
            first, *others = one.split("<|image_pad|>")
            expanded.append(first + "".join("<|image_pad|>" * next(counts) + other for other in others))
        tokens = self.tokenizer(expanded, padding=padding, return_tensors=return_tensors)
        return BatchFeature({**tokens, **shown})


def load_pipeline(base: Path, kind: Kind) -> Any:
    """Load with diffusers and transformers, float32, passing on which tokens are images."""
    folder = base / MODEL_ID
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(base / "Qwen/Qwen-Image-Edit/processor")
    text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    text_encoder.register_forward_pre_hook(mark_image_tokens, with_kwargs=True)
    pipeline = kind.pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        processor=Processor(tokenizer, image_processor),
        transformer=QwenImageTransformer2DModel.from_pretrained(
            base / kind.model_id / "transformer", torch_dtype=torch.float32
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def mark_image_tokens(text_encoder: Any, positional: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a hook that adds `mm_token_type_ids`, which diffusers 0.42 does not pass to transformers 5."""
    assert "mm_token_type_ids" not in named, "diffusers hands it on: this hook can go"
    types = (named["input_ids"] == text_encoder.config.image_token_id).int()
    return positional, {**named, "mm_token_type_ids": types}


def shrink_published_areas(monkeypatch: Any) -> None:
    """Make the pipelines resize images to a 64th of their area."""
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        original = module.calculate_dimensions
        monkeypatch.setattr(
            module, "calculate_dimensions", lambda area, ratio, original=original: original(area / 64, ratio)
        )


@dataclass(frozen=True)
class EditPair:
    """One variant, loaded by both."""

    kind: Kind
    ours: Ours
    pipeline: Any

    @cached_property
    def images(self) -> list[Image.Image]:
        return [photograph(name) for name in self.kind.images]


def load_pair(base: Path, kind: Kind) -> EditPair:
    return EditPair(kind, load_ours(base, kind), load_pipeline(base, kind))

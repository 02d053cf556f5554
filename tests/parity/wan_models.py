"""Tiny Wan models of every variant, and clips for them: loaded by us, and by diffusers' pipelines from the same
files.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionModel, PreTrainedTokenizerFast, UMT5EncoderModel

from diffsynth_core.models.registry import load_family
from tests.parity import models
from tests.parity.models import Ours
from tests.parity.photographs import photograph, pixels_of

DIFFUSERS_PLACES = {
    "dit": "transformer/diffusion_pytorch_model*.safetensors",
    "text_encoder": "text_encoder/model*.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "image_encoder": "image_encoder/model.safetensors",
}


@dataclass(frozen=True)
class Kind:
    """One use of one model; `shown` are the extra inputs."""

    model_id: str
    shown: tuple[str, ...] = ()
    image_encoder: bool = False
    newer_vae: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of test clips in pixels: few tokens, on both sides where that is cheap."""
        return (64, 32) if self.newer_vae else (32, 48)

    @property
    def components(self) -> tuple[str, ...]:
        return ("dit", "text_encoder", "vae", *(("image_encoder",) if self.image_encoder else ()))

    @property
    def entries(self) -> dict[str, str]:
        """Component -> file in a diffusers repository."""
        return {component: f"{self.model_id}-Diffusers:{DIFFUSERS_PLACES[component]}" for component in self.components}


find_files = partial(models.find_files, "wan")
load_files = partial(models.load_files, "wan")
PROMPT = "an astronaut &amp; a flag"
FIRST, BOTH = ("input_image",), ("input_image", "end_image")
KINDS = {
    "T2V": Kind("Wan-AI/Wan2.1-T2V-1.3B"),
    "I2V 2.1": Kind("Wan-AI/Wan2.1-I2V-14B-480P", FIRST, image_encoder=True),
    "FLF2V": Kind("Wan-AI/Wan2.1-FLF2V-14B-720P", BOTH, image_encoder=True),
    "I2V 2.2": Kind("Wan-AI/Wan2.2-I2V-A14B", FIRST),
    "I2V 2.2, two images": Kind("Wan-AI/Wan2.2-I2V-A14B", BOTH),
    "TI2V, text": Kind("Wan-AI/Wan2.2-TI2V-5B", newer_vae=True),
    "TI2V, image": Kind("Wan-AI/Wan2.2-TI2V-5B", FIRST, newer_vae=True),
}


def write_models(base: Path) -> None:
    """Write every variant in the layout of diffusers repositories."""
    written: set[str] = set()
    for kind in KINDS.values():
        for component, entry in kind.entries.items():
            if entry not in written:
                load_family("wan").write_tiny_weights(base, component, *entry.split(":"))
                written.add(entry)


def load_pipeline(base: Path, kind: Kind) -> WanPipeline | WanImageToVideoPipeline:
    """Load with diffusers and transformers, float32."""
    folder = base / f"{kind.model_id}-Diffusers"
    common = {
        # transformers would rebuild it without the fallback to bytes: this is the published tokenizer.json as it is.
        "tokenizer": PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer" / "tokenizer.json"), pad_token="<pad>", eos_token="</s>"
        ),
        "text_encoder": UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        "vae": AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        "transformer": WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "expand_timesteps": kind.newer_vae,
    }
    if not kind.shown:
        return WanPipeline(**common)
    if kind.image_encoder:
        common |= {
            "image_encoder": CLIPVisionModel.from_pretrained(folder / "image_encoder", dtype=torch.float32),
            "image_processor": CLIPImageProcessorPil.from_pretrained(folder / "image_processor"),
        }
    return WanImageToVideoPipeline(**common)


@dataclass(frozen=True)
class WanPair:
    """One variant, loaded by both."""

    kind: Kind
    ours: Ours
    pipeline: Any

    @cached_property
    def clip(self) -> np.ndarray:
        return clip_of("astronaut", 9, *self.kind.size)

    @cached_property
    def encoded(self) -> dict[str, torch.Tensor]:
        """The clip and a caption, encoded by us."""
        return self.ours.encode({"prompt": PROMPT, "video": pixels_of(self.clip)})


def load_pair(base: Path, kind: Kind) -> WanPair:
    return WanPair(
        kind, models.load_ours(base, kind.entries.values(), extra_inputs=kind.shown), load_pipeline(base, kind)
    )


def clip_of(name: str, frames: int, height: int, width: int) -> np.ndarray:
    """Return a pan and zoom over a photograph, `[F, H, W, 3]` uint8, whose frames differ."""
    whole = photograph(name)
    full_width, full_height = whole.size
    images = []
    for frame in range(frames):
        part = 1 - 0.03 * frame  # of each side
        left, top = 0.02 * frame * full_width, 0.01 * frame * full_height
        box = (left, top, left + part * full_width * 0.8, top + part * full_height * 0.8)
        images.append(np.asarray(whole.resize((width, height), Image.Resampling.BICUBIC, box)))
    return np.stack(images)


def images_of(clip: np.ndarray, shown: tuple[str, ...]) -> dict[str, Image.Image]:
    """Return the conditioning frames, as the pipelines name them."""
    frames = {"input_image": ("image", 0), "end_image": ("last_image", -1)}
    return {frames[name][0]: Image.fromarray(clip[frames[name][1]]) for name in shown}

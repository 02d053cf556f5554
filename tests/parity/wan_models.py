"""Tiny Wan models of every kind, and clips for them: loaded by us, and by diffusers' pipelines from the same files."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPVisionModel, PreTrainedTokenizerFast, UMT5EncoderModel

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.families.family import Family
from diffsynth_core.families.interface import ComponentFiles, Variant
from diffsynth_core.families.loading import load_component
from diffsynth_core.families.table import load_family
from diffsynth_core.planning.components import FoundComponents, find_components
from diffsynth_core.progress import SilentReporter

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
        """Height and width of test clips in pixels: few tokens, along both sides where that is cheap."""
        return (64, 32) if self.newer_vae else (32, 48)

    @property
    def components(self) -> tuple[str, ...]:
        return ("dit", "text_encoder", "vae", *(("image_encoder",) if self.image_encoder else ()))

    @property
    def entries(self) -> dict[str, str]:
        """Its files in a diffusers repository, by component."""
        return {component: f"{self.model_id}-Diffusers:{DIFFUSERS_PLACES[component]}" for component in self.components}


PROMPT = "an astronaut &amp; a flag"
FIRST, BOTH = ("input_image",), ("input_image", "end_image")
KINDS = {
    "T2V": Kind("Wan-AI/Wan2.1-T2V-1.3B"),
    "I2V 2.1": Kind("Wan-AI/Wan2.1-I2V-14B-480P", FIRST, image_encoder=True),
    "FLF2V": Kind("Wan-AI/Wan2.1-FLF2V-14B-720P", BOTH, image_encoder=True),
    "I2V 2.2": Kind("Wan-AI/Wan2.2-I2V-A14B", FIRST),
    "I2V 2.2, two pictures": Kind("Wan-AI/Wan2.2-I2V-A14B", BOTH),
    "TI2V, text": Kind("Wan-AI/Wan2.2-TI2V-5B", newer_vae=True),
    "TI2V, picture": Kind("Wan-AI/Wan2.2-TI2V-5B", FIRST, newer_vae=True),
}


def write_models(base: Path) -> None:
    """Every kind, in the layout of diffusers repositories."""
    written: set[str] = set()
    for kind in KINDS.values():
        for component, entry in kind.entries.items():
            if entry not in written:
                load_family("wan").write_tiny_weights(base, component, *entry.split(":"))
                written.add(entry)


@dataclass(frozen=True)
class Ours:
    """A model as the trainer has it, float32."""

    family: Family
    found: FoundComponents
    components: Mapping[str, Any]

    @property
    def variant(self) -> Variant:
        return self.found.variant

    @torch.no_grad()
    def encode(self, sample: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """What all encoders make of a sample, which holds `prompt` and `video`."""
        encoded: dict[str, torch.Tensor] = {}
        for encoder in self.variant.encoders:
            read = {name: sample[name] for name in encoder.columns}
            if encoder.first_frame_only:
                read["video"] = read["video"][:, :1]
            encoded |= self.family.encode(encoder, self.components, read)
        return encoded


def find_files(base: Path, component: str, entry: str) -> ComponentFiles:
    """The files of one component as a run finds them."""
    problems: list[Any] = []
    found = find_components(Parameters(model_id_with_origin_paths=(entry,)), "wan", base, problems)
    assert found and component in found.components, problems
    return found.components[component]


def load_files(files: ComponentFiles) -> nn.Module:
    """A component, float32, read by our own loader."""
    return load_component(load_family("wan"), files, torch.float32, torch.device("cpu"), SilentReporter())


def load_ours(base: Path, kind: Kind) -> Ours:
    """All components as a run finds and loads them."""
    family = load_family("wan")
    problems: list[Any] = []
    parameters = Parameters(model_id_with_origin_paths=tuple(kind.entries.values()), extra_inputs=kind.shown)
    found = find_components(parameters, None, base, problems)
    assert found and not problems, problems
    components = {name: load_files(files) for name, files in found.components.items()}
    tokenizers = {name: family.load_tokenizer(name, folder) for name, folder in found.tokenizers.items()}
    return Ours(family, found, {**components, **tokenizers})


def load_pipeline(base: Path, kind: Kind) -> WanPipeline | WanImageToVideoPipeline:
    """Read by diffusers and transformers, float32."""
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
    """One kind of model, read by both."""

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
    return WanPair(kind, load_ours(base, kind), load_pipeline(base, kind))


def clip_of(name: str, frames: int, height: int, width: int) -> np.ndarray:
    """A photograph panned over and zoomed into, `[F, H, W, 3]` uint8; frames differ."""
    photograph = Image.fromarray(getattr(skimage.data, name)()[..., :3])
    full_width, full_height = photograph.size
    pictures = []
    for frame in range(frames):
        part = 1 - 0.03 * frame  # of each side
        left, top = 0.02 * frame * full_width, 0.01 * frame * full_height
        box = (left, top, left + part * full_width * 0.8, top + part * full_height * 0.8)
        pictures.append(np.asarray(photograph.resize((width, height), Image.Resampling.BICUBIC, box)))
    return np.stack(pictures)


def pixels_of(clip: np.ndarray) -> torch.Tensor:
    """`[3, F, H, W]` in [-1, 1]."""
    return torch.tensor(clip).permute(3, 0, 1, 2).float() / 127.5 - 1


def pictures_of(clip: np.ndarray, shown: tuple[str, ...]) -> dict[str, Image.Image]:
    """The frames that are shown, as the pipelines call them."""
    frames = {"input_image": ("image", 0), "end_image": ("last_image", -1)}
    return {frames[name][0]: Image.fromarray(clip[frames[name][1]]) for name in shown}

"""Tiny FLUX.1 models read by us and by diffusers' pipelines from the same files; pictures to train on and to show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast, T5EncoderModel

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.families.family import Family
from diffsynth_core.families.interface import ComponentFiles, Variant
from diffsynth_core.families.loading import load_component
from diffsynth_core.families.table import load_family
from diffsynth_core.planning.components import find_components
from diffsynth_core.progress import SilentReporter

MODEL_ID = "black-forest-labs/FLUX.1-dev"
TEXT_ENCODERS = {
    "text_encoder_1": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/*.safetensors",
}
DIFFUSERS_PLACES = {
    "dit": "transformer/*.safetensors",
    **TEXT_ENCODERS,
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
ORIGINAL_PLACES = {"dit": "flux1-dev.safetensors", **TEXT_ENCODERS, "vae": "ae.safetensors"}
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
SIZE = (64, 96)
"""Height and width of the picture that is made."""
PUBLISHED_PIXELS = 1024 * 1024
FEW_PIXELS = PUBLISHED_PIXELS // 64
"""`max_pixels` under which reference pictures have a 64th of the published area."""


@dataclass(frozen=True)
class Kind:
    """One use of the model; `shown` are names of `picture`."""

    pipeline: type
    shown: tuple[str, ...] = ()


KINDS = {
    "FLUX.1": Kind(FluxPipeline),
    "Kontext": Kind(FluxKontextPipeline, ("coffee",)),
    "Kontext, upright": Kind(FluxKontextPipeline, ("upright",)),
}


def picture(name: str) -> Image.Image:
    """A photograph; `upright` is higher than wide."""
    if name == "upright":
        return picture("chelsea").crop((120, 0, 300, 300))
    return Image.fromarray(getattr(skimage.data, name)()[..., :3])


def pixels_of(image: Image.Image) -> Tensor:
    """`[3, 1, H, W]` in [-1, 1]."""
    return torch.tensor(np.asarray(image)).permute(2, 0, 1)[:, None].float() / 127.5 - 1


def write_models(base: Path) -> None:
    """All components in both layouts, of the same weights."""
    for places in (DIFFUSERS_PLACES, ORIGINAL_PLACES):
        for component, place in places.items():
            load_family("flux").write_tiny_weights(base, component, MODEL_ID, place)


@dataclass(frozen=True)
class Ours:
    """A model as the trainer has it, float32."""

    family: Family
    variant: Variant
    components: Mapping[str, Any]

    def sample(
        self, prompt: str, name: str = "astronaut", shown: Sequence[Image.Image] = (), max_pixels: int = FEW_PIXELS
    ) -> dict[str, Any]:
        """What a row holds once it is read."""
        references = {
            reference.name: [pixels_of(_stretched(image, reference, max_pixels)) for image in shown]
            for reference in self.variant.references
        }
        return {"prompt": prompt, "image": pixels_of(picture(name).resize(SIZE[::-1])), **references}

    @torch.no_grad()
    def encode(self, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        """What all encoders make of a sample."""
        encoded: dict[str, Tensor] = {}
        for encoder in self.variant.encoders:
            read = {name: sample[name] for name in encoder.columns}
            encoded |= self.family.encode(encoder, self.components, read)
        return encoded


def _stretched(image: Image.Image, reference: Any, max_pixels: int) -> Image.Image:
    assert reference.factor == 1
    height, width = reference.size(image.width, image.height, max_pixels)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def find_files(base: Path, component: str, entry: str) -> ComponentFiles:
    """The files of one component as a run finds them."""
    problems: list[Any] = []
    found = find_components(Parameters(model_id_with_origin_paths=(entry,)), "flux", base, problems)
    assert found and component in found.components, problems
    return found.components[component]


def load_files(files: ComponentFiles) -> nn.Module:
    """A component, float32, read by our own loader."""
    return load_component(load_family("flux"), files, torch.float32, torch.device("cpu"), SilentReporter())


def load_ours(base: Path, kind: Kind, places: Mapping[str, str] = ORIGINAL_PLACES) -> Ours:
    """All components as a run finds and loads them."""
    family = load_family("flux")
    problems: list[Any] = []
    parameters = Parameters(
        model_id_with_origin_paths=tuple(f"{MODEL_ID}:{place}" for place in places.values()),
        extra_inputs=("kontext_images",) if kind.shown else (),
    )
    found = find_components(parameters, None, base, problems)
    assert found and not problems, problems
    components = {name: load_files(files) for name, files in found.components.items()}
    tokenizers = {name: family.load_tokenizer(name, folder) for name, folder in found.tokenizers.items()}
    return Ours(family, found.variant, {**components, **tokenizers})


def load_pipeline(base: Path, pipeline: type = FluxPipeline, model_id: str = MODEL_ID) -> Any:
    """Read by diffusers and transformers from the folders of a diffusers repository, float32."""
    folder = base / model_id
    made = pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32),
        # transformers would make it anew: this is the published tokenizer.json as it is.
        tokenizer_2=PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer_2" / "tokenizer.json"), pad_token="<pad>", eos_token="</s>"
        ),
        transformer=FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32),
    )
    made.set_progress_bar_config(disable=True)
    return made


@dataclass(frozen=True)
class FluxPair:
    """One use of the model, read by both; we read the original files, diffusers those of its own layout."""

    kind: Kind
    ours: Ours
    pipeline: Any

    @cached_property
    def shown(self) -> list[Image.Image]:
        return [picture(name) for name in self.kind.shown]


def load_pair(base: Path, kind: Kind) -> FluxPair:
    return FluxPair(kind, load_ours(base, kind), load_pipeline(base, kind.pipeline))

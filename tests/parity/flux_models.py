"""Tiny FLUX.1 models loaded by us and by diffusers' pipelines from the same files, with targets and reference
images.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast, T5EncoderModel

from diffsynth_core.models.registry import load_family
from tests.parity import models
from tests.parity.models import Ours
from tests.parity.photographs import photograph

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
find_files = partial(models.find_files, "flux")
load_files = partial(models.load_files, "flux")


@dataclass(frozen=True)
class Kind:
    """One use of the model; `shown` are names of `photograph`."""

    pipeline: type
    shown: tuple[str, ...] = ()


KINDS = {
    "FLUX.1": Kind(FluxPipeline),
    "Kontext": Kind(FluxKontextPipeline, ("coffee",)),
    "Kontext, upright": Kind(FluxKontextPipeline, ("upright",)),
}


def write_models(base: Path) -> None:
    """Write all components in both layouts with the same weights."""
    for places in (DIFFUSERS_PLACES, ORIGINAL_PLACES):
        for component, place in places.items():
            load_family("flux").write_tiny_weights(base, component, MODEL_ID, place)


def load_ours(base: Path, kind: Kind) -> Ours:
    """Load the original files."""
    entries = (f"{MODEL_ID}:{place}" for place in ORIGINAL_PLACES.values())
    return models.load_ours(base, entries, extra_inputs=("kontext_images",) if kind.shown else ())


def load_pipeline(base: Path, pipeline: type = FluxPipeline, **more: Any) -> Any:
    """Load a pipeline with `more` components from the folders of a repository, float32."""
    folder = base / MODEL_ID
    made = pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32),
        # transformers would rebuild it: this is the published tokenizer.json as it is.
        tokenizer_2=PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer_2" / "tokenizer.json"), pad_token="<pad>", eos_token="</s>"
        ),
        transformer=FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32),
        **more,
    )
    made.set_progress_bar_config(disable=True)
    return made


@dataclass(frozen=True)
class FluxPair:
    """One use of the model, loaded by both: by us from original files, by diffusers from its own layout."""

    kind: Kind
    ours: Ours
    pipeline: Any

    @cached_property
    def shown(self) -> list[Image.Image]:
        return [photograph(name) for name in self.kind.shown]


def load_pair(base: Path, kind: Kind) -> FluxPair:
    return FluxPair(kind, load_ours(base, kind), load_pipeline(base, kind.pipeline))

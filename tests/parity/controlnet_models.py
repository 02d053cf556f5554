"""Tiny ControlNets of Qwen-Image and FLUX.1 with their transformers, and diffusers' pipelines of the same files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from diffsynth_core.models.flux import tiny as tiny_flux
from diffsynth_core.models.qwen_image import tiny as tiny_qwen
from tests.parity import flux_models

CONTROL = "controlnet/diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Kind:
    """A family, the blocks of its transformer and its ControlNet, and whether the ControlNet has a guidance input."""

    family: str
    blocks: int
    controls: int
    guidance: bool = True

    @property
    def model_id(self) -> str:
        return "Qwen/Qwen-Image" if self.family == "qwen-image" else "black-forest-labs/FLUX.1-dev"

    @property
    def places(self) -> dict[str, str]:
        if self.family == "qwen-image":
            encoders = {"text_encoder": "text_encoder/model*.safetensors"}
        else:
            encoders = {
                "text_encoder_1": "text_encoder/model.safetensors",
                "text_encoder_2": "text_encoder_2/*.safetensors",
            }
        vae = {"vae": "vae/diffusion_pytorch_model.safetensors"}
        return {"dit": "transformer/diffusion_pytorch_model.safetensors", **encoders, **vae, "controlnet": CONTROL}


KINDS = {
    "Qwen-Image": Kind("qwen-image", 3, 2),
    "Qwen-Image, more blocks than the transformer": Kind("qwen-image", 2, 3),
    "FLUX.1": Kind("flux", 3, 2),
    "FLUX.1 without guidance": Kind("flux", 2, 2, guidance=False),
}


def write_models(base: Path, kind: Kind) -> None:
    tiny: Any = tiny_qwen if kind.family == "qwen-image" else tiny_flux
    for component, place in kind.places.items():
        blocks = kind.controls if component == "controlnet" else kind.blocks
        tiny.write_tiny_weights(base, component, kind.model_id, place, tiny.TinySizes(blocks=blocks))
    if not kind.guidance:
        control = FluxControlNetModel.from_pretrained(base / kind.model_id / "controlnet")
        unmarked = FluxControlNetModel.from_config(control.config, guidance_embeds=False)
        unmarked.load_state_dict(control.state_dict(), strict=False)
        unmarked.save_pretrained(base / kind.model_id / "controlnet")


def load_pipeline(base: Path, kind: Kind) -> Any:
    """Load with diffusers and transformers from the same files."""
    folder = base / kind.model_id
    if kind.family == "flux":
        controlnet = FluxControlNetModel.from_pretrained(folder / "controlnet", torch_dtype=torch.float32)
        return flux_models.load_pipeline(base, FluxControlNetPipeline, controlnet=controlnet)
    made = QwenImageControlNetPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        tokenizer=Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
        transformer=QwenImageTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32),
        controlnet=QwenImageControlNetModel.from_pretrained(folder / "controlnet", torch_dtype=torch.float32),
    )
    made.set_progress_bar_config(disable=True)
    return made

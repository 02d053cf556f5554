"""Tiny Qwen-Image twice: loaded by us, and by diffusers' own pipeline from the same files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from diffsynth_core.families.interface import ComponentFiles
from diffsynth_core.families.loading import load_component
from diffsynth_core.families.table import load_family
from diffsynth_core.progress import SilentReporter
from tests.conftest import MODEL_ID, PLACES

SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
"""The published scheduler configuration of Qwen-Image."""


@pytest.fixture(scope="session")
def family():
    return load_family("qwen-image")


@pytest.fixture(scope="session")
def ours(family, tiny_models: Path) -> dict[str, Any]:
    """Our components, float32, read by our own loader."""
    folder = tiny_models / MODEL_ID
    components: dict[str, Any] = {"tokenizer_path": family.load_tokenizer("tokenizer_path", folder / "tokenizer")}
    for component, place in PLACES.items():
        paths = tuple(sorted(folder.glob(place)))
        files = ComponentFiles(component, place, paths, paths[0].parent / "config.json")
        components[component] = load_component(family, files, torch.float32, torch.device("cpu"), SilentReporter())
    return components


@pytest.fixture
def pipeline(tiny_models: Path) -> QwenImagePipeline:
    """diffusers' pipeline over the same files, float32, read by diffusers and transformers."""
    folder = tiny_models / MODEL_ID
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER),
        vae=AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        tokenizer=Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
        transformer=QwenImageTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32),
    )

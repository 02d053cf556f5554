"""What LoRA files state about themselves for other programs."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from diffsynth_core.models.registry import FAMILIES

RUN = ("--device", "cpu", "--dataset_num_workers", 0)


@pytest.fixture
def train(cli, photographs) -> Callable[..., Path]:
    def run(name: str, *flags: object) -> Path:
        outcome = cli("train", *RUN, "--dataset_base_path", photographs, "--output_path", name, *flags)
        assert outcome.code == 0, outcome.err
        return Path(name)

    return run


def public(path: Path) -> dict[str, str]:
    """The metadata of a file that are not for this program alone."""
    with safe_open(path, "pt") as stream:
        return {key: text for key, text in stream.metadata().items() if key.startswith(("modelspec.", "diffsynth."))}


def test_a_lora_states_architecture_size_and_base(cli, train, tiny_models):
    sizes = ("--height", 32, "--width", 64)
    folder = train("private", "--recipe", "qwen-image-lora", "--max_steps", 2, "--ema_decay", 0.9, *sizes)
    base = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((tiny_models / "Qwen/Qwen-Image/transformer").glob("*.safetensors"))
    }
    stated = public(folder / "epoch-0.safetensors")
    assert json.loads(stated.pop("diffsynth.base")) == base
    assert stated == {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "Qwen-Image/lora",
        "modelspec.implementation": "https://github.com/QwenLM/Qwen-Image",
        "modelspec.title": "LoRA of Qwen-Image, step 2",
        "modelspec.resolution": "64x32",
    }
    averages = public(folder / "epoch-0.ema.safetensors")
    assert averages["modelspec.title"] == "LoRA of Qwen-Image, step 2, averaged weights"
    converted = cli("convert-lora", folder / "epoch-0.ema.safetensors", "--to", "kohya", "-o", "kohya.safetensors")
    assert converted.code == 0, converted.err
    assert public(Path("kohya.safetensors")) == averages


def test_full_weights_state_none(train):
    folder = train("full", "--recipe", "qwen-image-full", "--max_steps", 1)
    assert public(folder / "epoch-0.safetensors") == {}


NAMES = {
    "qwen-image": {
        "Qwen/Qwen-Image": "Qwen-Image",
        "Qwen/Qwen-Image-Edit": "Qwen-Image-Edit",
        "Qwen/Qwen-Image-Edit-2509": "Qwen-Image-Edit-Plus",
        "Qwen/Qwen-Image-Edit-2511": "Qwen-Image-Edit-2511",
        "FireRedTeam/FireRed-Image-Edit-1.1": "Qwen-Image-Edit-Plus",
    },
    "flux": {"black-forest-labs/FLUX.1-dev": "flux-1-dev", "black-forest-labs/FLUX.1-Kontext-dev": "flux-1-dev"},
    "flux2": {
        "black-forest-labs/FLUX.2-klein-4B": "Flux.2-klein-4b",
        "black-forest-labs/FLUX.2-klein-9B": "Flux.2-klein-9b",
    },
    "wan": {"Wan-AI/Wan2.1-T2V-1.3B": "wan2.1", "Wan-AI/Wan2.2-TI2V-5B": "wan2.1"},
}
"""Those that sd-scripts (for FLUX.1) and musubi-tuner (for the others) write."""


@pytest.mark.parametrize("family", FAMILIES)
def test_architectures_have_the_names_of_other_trainers(family):
    facts = FAMILIES[family]
    assert {model_id: facts.architecture(model_id) for model_id in NAMES[family]} == NAMES[family]
    assert facts.repository.startswith("https://github.com/")

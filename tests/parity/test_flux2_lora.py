"""LoRA files of real FLUX.2 runs, loaded by diffusers' pipeline: all modules, and our output."""

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffsynth_core.adapters.lora import lora_weights
from diffsynth_core.models.flux2.spec import FLUX2
from diffsynth_core.weights.key_maps import SAME_NAMES
from tests.conftest import CAPTIONS
from tests.parity.flux2_models import MODEL_IDS, SINGLE_BLOCKS, entries_of, find_files, load_files, load_pipeline
from tests.parity.loras import adapter_modules, check_outputs, check_same_weights, load_into, train_file, with_lora

FORMATS = ("diffsynth", "diffusers")
NAMING = FLUX2.component("dit").lora_naming
DOUBLE_MODULES = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{part}.{name}" for part in ("ff", "ff_context") for name in ("linear_in", "linear_out")),
)


def modules_of(name: str) -> set[str]:
    """Return the documented target modules."""
    double = {f"transformer_blocks.{block}.{place}" for block in range(2) for place in DOUBLE_MODULES}
    single = {
        f"single_transformer_blocks.{block}.attn.{place}"
        for block in range(SINGLE_BLOCKS[name])
        for place in ("to_qkv_mlp_proj", "to_out")
    }
    return double | single


@dataclass(frozen=True)
class LoraRun:
    """What is trained, and further parameters of the run."""

    model: str
    flags: Mapping[str, str] = field(default_factory=dict)


RUNS = {
    "4B, as its recipe": LoraRun("4B", {"recipe": "flux.2-klein-4b-lora"}),
    "base 9B, from images": LoraRun("base 9B", {"extra_inputs": "edit_image"}),
}


@pytest.fixture(scope="module")
def metadata(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs, half of them with one reference image, half with two."""
    path = tmp_path_factory.mktemp("metadata") / "metadata.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "prompt", "edit_image"])
        for number, (name, caption) in enumerate(CAPTIONS.items()):
            shown = '["coffee.png", "rocket.png"]' if number % 2 else "chelsea.png"
            writer.writerow([f"{name}.png", caption, shown])
    return path


@pytest.fixture(scope="module")
def train_lora(
    flux2_models: Path, photographs: Path, metadata: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """Train a LoRA on four images with a large learning rate; return its file."""
    folder = tmp_path_factory.mktemp("runs")

    @cache
    def train_one(name: str, lora_format: str) -> Path:
        run = RUNS[name]
        flags = {
            "model_id_with_origin_paths": ",".join(entries_of(run.model).values()),
            "tokenizer_path": f"{MODEL_IDS[run.model]}:tokenizer/",
            "dataset_base_path": str(photographs),
            "dataset_metadata_path": str(metadata),
            "data_file_keys": "image,edit_image",
            "dataset_repeat": "1",
            "learning_rate": "0.02",
            **run.flags,
        }
        return train_file(flux2_models, folder / name / lora_format, lora_format, flags)

    return train_one


def load_transformer(base: Path, name: str) -> Any:
    return load_files(find_files(base, "dit", entries_of(name)["dit"]))


def load_with_lora(base: Path, name: str, path: Path) -> Any:
    """Return the transformer with a LoRA file, loaded by us."""
    return with_lora(load_transformer(base, name), path, modules_of(name), NAMING, SAME_NAMES)


@torch.no_grad()
def predict(transformer: Any) -> Tensor:
    config, generator = transformer.config, torch.Generator().manual_seed(3)
    positions = torch.zeros(12, 4, dtype=torch.int64)
    positions[:, 1] = torch.arange(12)
    return transformer(
        hidden_states=torch.randn(1, 12, config.in_channels, generator=generator),
        timestep=torch.tensor([0.6]),
        guidance=None,
        encoder_hidden_states=torch.randn(1, 9, config.joint_attention_dim, generator=generator),
        img_ids=positions,
        txt_ids=positions[:9].flip(1),
        return_dict=False,
    )[0]


@pytest.mark.parametrize("name", RUNS)
def test_the_file_loads_through_the_pipeline_and_computes_the_same(train_lora, flux2_models, complaints, name):
    model = RUNS[name].model
    pipeline = load_pipeline(flux2_models, model)
    load_into(pipeline, train_lora(name, "diffusers"))
    assert complaints() == []
    assert adapter_modules(pipeline.transformer).keys() == modules_of(model)
    loaded = predict(pipeline.transformer)
    ours = predict(load_with_lora(flux2_models, model, train_lora(name, "diffsynth")))
    base = predict(load_transformer(flux2_models, model))
    check_outputs(f"{name}: {len(modules_of(model))} modules", loaded, ours, base)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(
    ("lora_format", "prefix", "ending"),
    [("diffsynth", "", ".default.weight"), ("diffusers", "transformer.", ".weight")],
)
def test_keys(train_lora, name, lora_format, prefix, ending):
    tensors = load_file(train_lora(name, lora_format))
    modules = modules_of(RUNS[name].model)
    assert tensors.keys() == {f"{prefix}{module}.lora_{half}{ending}" for module in modules for half in "AB"}
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


@pytest.mark.parametrize("name", RUNS)
def test_both_dialects_read_back_to_the_same_weights(train_lora, flux2_models, name):
    model = RUNS[name].model
    loaded = [load_with_lora(flux2_models, model, train_lora(name, lora_format)) for lora_format in FORMATS]
    check_same_weights([lora_weights(transformer, SAME_NAMES) for transformer in loaded], modules_of(model))

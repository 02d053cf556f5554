"""LoRAs of the editing models in every format, loaded by both pipelines: all modules, nothing logged, our output."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffsynth_core.adapters.lora import add_lora, load_lora, lora_weights, name_lora
from diffsynth_core.models.qwen_image.spec import QWEN_IMAGE
from diffsynth_core.models.spec import match_targets, modules_with_weights
from tests.loras import RANK
from tests.parity.loras import adapter_modules, check_outputs, load_into
from tests.parity.qwen_edit_models import KINDS, load_pipeline

FORMATS = ("diffsynth", "diffusers", "comfyui", "kohya")
NAMES = ("Edit", "2509, two images", "2511, two images")
DIT = QWEN_IMAGE.component("dit")


def fresh_transformer(base: Path, name: str) -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    folder = base / KINDS[name].model_id / "transformer"
    return QwenImageTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()


def documented_modules(transformer: nn.Module) -> list[str]:
    """Return the documented target modules, without those that cannot influence the output."""
    shapes = {key: tuple(tensor.shape) for key, tensor in transformer.state_dict().items()}
    modules = modules_with_weights(shapes)
    found = {module for names in match_targets(modules, DIT.lora_targets).values() for module in names}
    return sorted(found - DIT.unused_params(frozenset(shapes)))


def write_lora(base: Path, name: str, path: Path, lora_format: str) -> list[str]:
    """Write a LoRA on the documented modules, far from its initialization; return the modules."""
    transformer = fresh_transformer(base, name)
    modules = documented_modules(transformer)
    add_lora(transformer, modules, RANK, seed=0)
    weights = lora_weights(transformer)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in sorted(weights):
            weights[module].B.normal_(std=0.5, generator=generator)
    tensors = name_lora(weights, lora_format, DIT.lora_naming)
    save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path)
    return modules


@torch.no_grad()
def predict(transformer: Any) -> Tensor:
    """Predict one target of 4 x 6 tokens with two reference images."""
    generator = torch.Generator().manual_seed(3)
    return transformer(
        hidden_states=torch.randn(1, 24 + 16 + 10, 64, generator=generator),
        timestep=torch.tensor([0.6]),
        encoder_hidden_states=torch.randn(1, 9, transformer.config.joint_attention_dim, generator=generator),
        img_shapes=[[(1, 4, 6), (1, 4, 4), (1, 2, 5)]],
        return_dict=False,
    )[0][:, :24]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lora_format", FORMATS)
def test_every_dialect_loads_through_the_pipeline_and_computes_the_same(
    edit_models, complaints, tmp_path, name, lora_format
):
    path = tmp_path / "lora.safetensors"
    modules = write_lora(edit_models, name, path, lora_format)
    pipeline = load_pipeline(edit_models, KINDS[name])
    base = predict(pipeline.transformer)
    load_into(pipeline, path)
    assert complaints() == []
    assert adapter_modules(pipeline.transformer).keys() == set(modules)
    loaded = predict(pipeline.transformer)

    ours = fresh_transformer(edit_models, name)
    add_lora(ours, modules, RANK, seed=1)
    assert load_lora(ours, path, DIT.lora_naming) == len(modules)
    check_outputs(f"{KINDS[name].model_id}, {lora_format}: {len(modules)} modules", loaded, predict(ours), base)


def test_diffusers_keys(edit_models, tmp_path):
    modules = write_lora(edit_models, "Edit", tmp_path / "lora.safetensors", "diffusers")
    # 12 documented targets in each of 2 blocks, without 3 of the last that cannot influence the output
    assert len(modules) == 21
    assert load_file(tmp_path / "lora.safetensors").keys() == {
        f"transformer.{module}.lora_{half}.weight" for module in modules for half in "AB"
    }

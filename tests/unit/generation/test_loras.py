"""LoRAs beside the weights while drawing: each layer computes what merged weights would, whatever was set before."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from diffsynth_core.adapters.deltas import open_deltas
from diffsynth_core.adapters.lora import lora_layers
from diffsynth_core.generation.loras import lora_setup, merged_differences, set_loras
from diffsynth_core.models.loading import load_component
from diffsynth_core.models.registry import load_family
from diffsynth_core.planning.drawing.jobs import AppliedLora, GenerationJob
from diffsynth_core.planning.model.lora_files import read_lora_of, tensor_shapes
from diffsynth_core.planning.model.model_plan import ModelPlan
from diffsynth_core.progress import SilentReporter
from tests.loras import FORMATS, TinyFamily, random_lora, save_lora

CPU = torch.device("cpu")
JOB = GenerationJob(
    prompt="", negative_prompt="", seed=0, steps=1, cfg_scale=1.0, guidance=None, height=64, width=64
)  # fmt: skip


def applied(model: ModelPlan, path: Path, weight: float) -> AppliedLora:
    lora = read_lora_of(path, "dit", model)
    return AppliedLora(lora=lora, component="dit", weight=weight, shapes=tensor_shapes("dit", model))


def load(model: ModelPlan, *sets: tuple[AppliedLora, ...]) -> nn.Module:
    """Load the transformer for jobs with these LoRAs."""
    family, files = load_family(model.facts.name), model.components["dit"]
    jobs = [replace(JOB, adapters=adapters) for adapters in sets]
    setup = lora_setup(jobs, "dit", files.layout.public_keys)
    with merged_differences(sets[0], "dit", files.layout.public_keys) as change:
        return load_component(family, files, torch.float32, CPU, SilentReporter(), setup=setup, change=change)


def apply(model: ModelPlan, module: nn.Module, adapters: tuple[AppliedLora, ...]) -> nn.Module:
    set_loras(module, adapters, "dit", model.components["dit"].layout.public_keys)
    return module


def merged_weight(model: ModelPlan, name: str, weight: Tensor, adapters: tuple[AppliedLora, ...]) -> Tensor:
    """W + sum of weight x (alpha / rank) B A, from the files."""
    rows = weight.reshape(len(weight), -1)
    for one in adapters:
        with open_deltas(one.lora, one.shapes, model.components["dit"].layout.public_keys) as deltas:
            delta = deltas.of(f"{name}.weight")
            rows = rows if delta is None else rows + one.weight * delta.dense(0, len(rows))
    return rows.reshape(weight.shape)


def check_layers(model: ModelPlan, module: nn.Module, adapters: tuple[AppliedLora, ...]) -> int:
    """Compare every layer with a LoRA with one that has merged weights; return how many the LoRAs change."""
    changed = 0
    for name, layer in lora_layers(module).items():
        base = layer.base_layer
        merged = merged_weight(model, name, base.weight, adapters)
        one = torch.randn(2, *base.weight.shape[1:], generator=torch.Generator().manual_seed(0))
        expected = functional_call(plain(base), {"weight": merged}, one)
        assert_close(layer(one), expected, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
        changed += not torch.equal(merged, base.weight)
    return changed


def plain(layer: nn.Module) -> nn.Module:
    """Return a layer with the weights of one that stores them in 8-bit floats; another unchanged."""
    if not hasattr(layer, "stored"):
        return layer
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    linear.load_state_dict({"weight": layer.weight, **({} if layer.bias is None else {"bias": layer.bias})})
    return linear


def matrices(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize(("family", "lora_format"), FORMATS)
def test_layers_compute_what_merged_weights_would(tiny_families, tmp_path, family, lora_format):
    tiny: TinyFamily = tiny_families(family)
    shapes, model = tiny.module_shapes(), tiny.plan(output_path=tmp_path / "out").model
    first = save_lora(tmp_path / "first.safetensors", random_lora(shapes, 4, 1), family, lora_format, alpha=2)
    half = dict(list(shapes.items())[: len(shapes) // 2])
    second = save_lora(tmp_path / "second.safetensors", random_lora(half, 3, 2), family, lora_format)
    both = applied(model, first, 0.7), applied(model, second, -0.5)
    module = load(model, both, both[:1])
    assert check_layers(model, apply(model, module, both), both) == len(lora_layers(module)) > 0
    check_layers(model, apply(model, module, both[1:]), both[1:])


def test_a_convolution(tiny_families, tmp_path):
    tiny: TinyFamily = tiny_families("wan")
    model = tiny.plan(output_path=tmp_path / "out").model
    shapes = {"patch_embedding": tensor_shapes("dit", model)["patch_embedding.weight"]}
    assert len(shapes["patch_embedding"]) == 5
    path = save_lora(tmp_path / "conv.safetensors", random_lora(shapes), "wan", "diffsynth")
    adapters = (applied(model, path, 1.5),)
    assert check_layers(model, apply(model, load(model, adapters), adapters), adapters) == 1


def test_changing_back_and_forth_leaves_nothing(tiny_families, tmp_path):
    tiny: TinyFamily = tiny_families("flux")
    shapes, model = tiny.module_shapes(), tiny.plan(output_path=tmp_path / "out").model
    paths = [
        save_lora(tmp_path / f"{rank}.safetensors", random_lora(shapes, rank, rank), "flux", "kohya") for rank in (4, 2)
    ]
    sets = [(applied(model, path, weight),) for path in paths for weight in (1.0, 0.5)] + [()]
    fresh = [matrices(apply(model, load(model, *sets), adapters)) for adapters in sets]
    module = load(model, *sets)
    for number in (0, 2, 1, 4, 3, 0, 4):
        found = matrices(apply(model, module, sets[number]))
        assert all(torch.equal(found[name], fresh[number][name]) for name in found)
    assert not any(value.any() for name, value in matrices(module).items() if ".lora_B." in name)
    assert any(not torch.equal(fresh[0][name], fresh[1][name]) for name in fresh[0])


def test_weights_in_8_bit_floats(tiny_families, tmp_path):
    tiny: TinyFamily = tiny_families("qwen-image")
    entry = tiny.plan(output_path=tmp_path / "out").model.components["dit"].origin
    model = tiny.plan(output_path=tmp_path / "out", fp8_models=entry).model
    assert model.float8_components == ["dit"]
    path = save_lora(tmp_path / "lora.safetensors", random_lora(tiny.module_shapes()), "qwen-image", "diffsynth")
    adapters = (applied(model, path, 0.5),)
    module = apply(model, load(model, adapters), adapters)
    assert sum(hasattr(layer.base_layer, "stored") for layer in lora_layers(module).values()) > 0
    assert check_layers(model, module, adapters) == len(lora_layers(module))


def test_full_differences_are_merged_while_loading(tiny_families, tmp_path):
    tiny: TinyFamily = tiny_families("wan")
    model = tiny.plan(output_path=tmp_path / "out").model
    shape = tensor_shapes("dit", model)["patch_embedding.bias"]
    path = save_lora(tmp_path / "lora.safetensors", random_lora(tiny.module_shapes()), "wan", "diffsynth")
    save_file(load_file(path) | {"patch_embedding.diff_b": torch.full(shape, 0.25)}, path)
    adapters = (applied(model, path, 2.0),)
    assert set(adapters[0].lora.tensors) == {"patch_embedding.bias"}
    module, without = load(model, adapters), load(model, ())
    assert_close(module.patch_embedding.bias, without.patch_embedding.bias + 0.5)
    check_layers(model, apply(model, module, adapters), adapters)

"""LoRAs merged into files of every family and layout: the weights of peft's and diffusers' merges, the same output."""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from diffsynth_core.conversion.bases import open_base
from diffsynth_core.conversion.merge_plan import plan_merge
from diffsynth_core.conversion.merging import merge
from diffsynth_core.conversion.provenance import InputHashes
from diffsynth_core.models.registry import FAMILIES
from diffsynth_core.models.spec import Layout
from diffsynth_core.progress import SilentReporter
from diffsynth_core.weights.lora_files import ADAPTER_SETTINGS
from diffsynth_core.weights.weighted_files import WeightedFile
from tests.loras import TinyFamily, random_lora, save_lora
from tests.parity.models import load_files

LAYOUTS = [(name, place) for name, facts in FAMILIES.items() for place in range(len(facts.component("dit").layouts))]
WEIGHTS = (0.75, -0.5)
RANKS = (4, 3)
ALPHAS = (8.0, 1.5)


@dataclass(frozen=True)
class Case:
    """A tiny transformer in float32, its file in one layout, and two LoRAs of it in diffusers' format."""

    model: nn.Module
    layout: Layout
    base: Path
    loras: tuple[Path, ...]

    def merge(self, *files: WeightedFile) -> dict[str, Tensor]:
        """Return the weights after our merge, by module key."""
        output = self.base.parent / "out"
        plan = plan_merge(open_base(str(self.base), output), files, output)
        merge(plan, InputHashes(plan.hashed), SilentReporter())
        merged: dict[str, Tensor] = {}
        for name, tensor in load_file(output / self.base.name).items():
            merged |= self.layout.names.split(name, tensor)
        return merged


def settings_of(path: Path, rank: int, alpha: float) -> dict[str, Any]:
    """Return diffusers' metadata of a LoRA file."""
    modules = sorted(halves_of(path))
    return {"transformer.r": rank, "transformer.lora_alpha": alpha, "transformer.target_modules": modules}


@pytest.fixture
def case(tiny_families: Callable[[str], TinyFamily], tmp_path) -> Callable[[str, int], Case]:
    def make(family: str, place: int) -> Case:
        tiny = tiny_families(family)
        model = load_files(family, tiny.plan(output_path="unused").model.components["dit"]).requires_grad_(False)
        layout = FAMILIES[family].component("dit").layouts[place]
        state = model.state_dict()
        base = tmp_path / "base.safetensors"
        save_file({name: layout.names.fuse(name, state).contiguous() for name in layout.names.to_sources(state)}, base)
        loras = []
        for number, (rank, alpha) in enumerate(zip(RANKS, ALPHAS, strict=True)):
            halves = random_lora(tiny.module_shapes(), rank, seed=number)
            loras.append(save_lora(tmp_path / f"{number}.safetensors", halves, family, "diffusers"))
            settings = {ADAPTER_SETTINGS: json.dumps(settings_of(loras[-1], rank, alpha))}
            save_file(load_file(loras[-1]), loras[-1], settings)
        return Case(model, layout, base, tuple(loras))

    return make


def halves_of(path: Path) -> dict[str, dict[str, Tensor]]:
    """Return A and B by module of diffusers."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        module, _, half = key.removeprefix("transformer.").removesuffix(".weight").rpartition(".")
        found.setdefault(module, {})[half] = tensor
    return found


def merge_with_peft(model: nn.Module, loras: tuple[Path, ...]) -> dict[str, Tensor]:
    """Apply `merge_and_unload` to all LoRAs, with their weights applied to alpha."""
    wrapped: Any = deepcopy(model)
    for number, path in enumerate(loras):
        halves = halves_of(path)
        config = LoraConfig(
            r=RANKS[number], lora_alpha=ALPHAS[number] * WEIGHTS[number], target_modules=list(halves), lora_dropout=0.0
        )
        if number:
            wrapped.add_adapter(str(number), config)
        else:
            wrapped = get_peft_model(wrapped, config, adapter_name="0")
        for module, tensors in halves.items():
            layer = wrapped.base_model.model.get_submodule(module)
            for half, tensor in tensors.items():
                getattr(layer, half)[str(number)].weight.data.copy_(tensor)
    merged: nn.Module = wrapped.merge_and_unload(adapter_names=[str(number) for number in range(len(loras))])
    return merged.state_dict()


def check(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:5]
    changed = [name for name in before if not expected[name].equal(before[name])]
    assert changed
    for name, tensor in expected.items():
        if name in changed:
            assert_close(found[name], tensor, rtol=0, atol=1e-6)
        else:
            assert found[name].equal(tensor), name


@pytest.mark.parametrize(("family", "place"), LAYOUTS)
def test_as_peft_merges_two_loras_of_other_ranks_alphas_and_weights(case, family, place):
    one = case(family, place)
    merged = one.merge(*(WeightedFile(path, weight) for path, weight in zip(one.loras, WEIGHTS, strict=True)))
    check(merged, merge_with_peft(one.model, one.loras), one.model.state_dict())


@pytest.mark.parametrize(("family", "place"), LAYOUTS)
def test_as_diffusers_fuses_and_as_it_computes_with_the_adapter(case, family, place):
    one = case(family, place)
    merged = one.merge(WeightedFile(one.loras[0], -0.5))
    with_adapter: Any = deepcopy(one.model)
    settings = settings_of(one.loras[0], RANKS[0], ALPHAS[0])
    with_adapter.load_lora_adapter(load_file(one.loras[0]), prefix="transformer", metadata=settings, adapter_name="a")
    with_adapter.set_adapters(["a"], [-0.5])
    merged_model = deepcopy(one.model)
    merged_model.load_state_dict(merged)
    before, ours, theirs = (predict(family, model) for model in (one.model, merged_model, with_adapter))
    assert (theirs - before).abs().max() > 2e-3 * before.abs().max(), "the LoRA does something"
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with_adapter.set_adapters(["a"], [1.0])
    with_adapter.fuse_lora(lora_scale=-0.5)
    with_adapter.unload_lora()
    check(merged, with_adapter.state_dict(), one.model.state_dict())


def predict(family: str, model: Any) -> Tensor:
    """Return the prediction of a transformer for fixed noise."""
    generator, config = torch.Generator().manual_seed(3), model.config

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    time = torch.tensor([0.6])
    if family == "wan":
        inputs = {
            "hidden_states": draw(1, config.in_channels, 3, 8, 8),
            "encoder_hidden_states": draw(1, 7, config.text_dim),
            "timestep": time * 1000,
        }
    else:
        inputs = {"hidden_states": draw(1, 24, config.in_channels), "timestep": time}
        inputs["encoder_hidden_states"] = draw(1, 9, config.joint_attention_dim)
    if family == "qwen-image":
        inputs["img_shapes"] = [[(1, 4, 6)]]
    if family.startswith("flux"):
        axes = len(config.axes_dims_rope)
        inputs |= {"img_ids": torch.ones(24, axes), "txt_ids": torch.zeros(9, axes)}
        inputs["guidance"] = torch.tensor([1.0]) if config.guidance_embeds else None
    if family == "flux":
        inputs["pooled_projections"] = draw(1, config.pooled_projection_dim)
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]

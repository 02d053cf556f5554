"""The seam of weight stores: one from outside keeps frozen weights, without a change in loading or training."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from diffsynth_core.config.resolve import resolve
from diffsynth_core.models.weight_store import STORES, WeightStore
from diffsynth_core.planning.memory.estimate import weight_bytes
from diffsynth_core.planning.memory.memory_config import memory_config
from diffsynth_core.planning.memory.sizes import find_workload
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training import loop

LAYER = "transformer_blocks.0.attn.to_k"


class Int8Linear(nn.Linear):
    """W = stored x scale, with a scale for each row."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias, self.dtype = (
            layer.in_features,
            layer.out_features,
            layer.bias,
            dtype,
        )
        self.stored = nn.Parameter(torch.empty(layer.weight.shape, dtype=torch.int8, device="meta"), False)
        self.register_buffer("scale", torch.empty(len(layer.weight), 1, device="meta"))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return (self.stored * self.scale).to(self.dtype)

    def forward(self, states: Tensor) -> Tensor:
        return functional.linear(states, self.weight, self.bias)


class Int8(WeightStore):
    bytes_per_weight, trains, rejects = 1.0, False, "that are too large"

    def layers(self, module: nn.Module) -> frozenset[str]:
        found = {name for name, layer in module.named_modules() if type(layer) is nn.Linear}
        return frozenset(name for name in found if name.startswith("transformer_blocks."))

    def empty_layer(self, layer: nn.Linear, dtype: torch.dtype) -> nn.Linear:
        return Int8Linear(layer, dtype)

    def pack(self, weight: Tensor, scale: Tensor | None = None) -> dict[str, Tensor] | None:
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
        return {"stored": (weight / scale).round().to(torch.int8), "scale": scale} if scale.max() < 1 else None


@pytest.fixture
def plan(tiny_models: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The plan of a LoRA in a folder of this name, with the transformer in a weight store; nothing is cached before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def plan(folder: str, storage: str = "plain", **more: object) -> RunPlan:
        flags = {"recipe": "qwen-image-lora", "dataset_base_path": str(photographs), "max_steps": 2, "lora_rank": 4,
                 "device": "cpu", "dataset_num_workers": 0, "output_path": str(tmp_path / folder), **more}  # fmt: skip
        made = make_plan(resolve(flags), SilentReporter(), base=tiny_models)
        components = {**made.model.components, "dit": replace(made.model.components["dit"], storage=storage)}
        return replace(made, model=replace(made.model, components=components))

    return plan


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The transformers of runs."""
    monkeypatch.setitem(STORES, "int8", Int8())
    seen: list[nn.Module] = []
    content = loop.checkpoint_content
    monkeypatch.setattr(
        loop,
        "checkpoint_content",
        lambda plan, model, *rest: seen.append(model.components["dit"]) or content(plan, model, *rest),
    )  # fmt: skip
    return seen


def run(plan: RunPlan) -> tuple[list[float], dict[str, Tensor]]:
    folder = loop.train(plan, SilentReporter(), StopRequest()).folder
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return losses, load_file(folder / "epoch-0.safetensors")


def test_a_weight_store_from_outside_keeps_weights_under_a_lora(plan, models):
    plain, stored, twice = (run(plan(name, name)) for name in ("plain", "int8", "float8"))
    wide, narrow, _ = models
    layer = narrow.get_submodule(f"{LAYER}.base_layer")
    assert isinstance(layer, Int8Linear) and layer.stored.dtype == torch.int8
    weight = wide.get_submodule(f"{LAYER}.base_layer").weight
    assert 0 < (layer.weight - weight).abs().max() <= weight.abs().max() / 127
    assert stored[0] == pytest.approx(plain[0], rel=0.05) and stored[0] not in (plain[0], twice[0])
    assert stored[1].keys() == plain[1].keys()


def test_its_bytes_are_estimated(plan, models):
    made = plan("out", "int8")
    config = memory_config(made, find_workload(made).largest)
    stored, float8, plain = (
        weight_bytes(made, "dit", replace(config, storage={"dit": name})) for name in ("int8", "float8", "plain")
    )
    assert stored == float8 < plain


def test_a_weight_that_it_cannot_keep_stays_in_its_layer(plan, models, monkeypatch):
    monkeypatch.setattr(Int8, "pack", lambda self, weight, scale=None: None)
    assert run(plan("plain"))[0] == run(plan("int8", "int8"))[0]
    assert type(models[1].get_submodule(f"{LAYER}.base_layer")) is nn.Linear

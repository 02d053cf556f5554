"""Quantized frozen weights against the dequantized weights in the compute dtype, in each family: the gradients of a
LoRA, and the bytes that are planned.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from diffsynth_core.adapters.stored import StoredLinear
from diffsynth_core.models.weight_store import STORES
from diffsynth_core.planning.memory.estimate import frozen_bytes, training_memory
from diffsynth_core.planning.memory.memory_config import memory_config
from diffsynth_core.planning.memory.sizes import find_workload
from tests.parity.float8_runs import RECIPES, Step, plan_step

CASES = [
    pytest.param(family, method, marks=() if method == "nf4" or family == "qwen-image" else pytest.mark.long)
    for family in RECIPES
    for method in ("fp8", "int8", "nf4")
]


def dequantize(model: nn.Module) -> int:
    """Put plain layers in the place of those of a weight store; return their number."""
    stored = {name: layer for name, layer in model.named_modules() if isinstance(layer, StoredLinear)}
    for name, layer in stored.items():
        plain = nn.Linear(layer.in_features, layer.out_features, device="meta", dtype=layer.compute_dtype)
        plain.weight, plain.bias = nn.Parameter(layer.weight, requires_grad=False), layer.bias
        model.set_submodule(name, plain)
    return len(stored)


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient.flatten().double() for gradient in gradients.values()])


@pytest.mark.parametrize(("family", "method"), CASES)
def test_lora_gradients_are_those_of_the_dequantized_weights(family, method, folder):
    """And the frozen weights take the bytes that the plan counts."""
    plan = plan_step(family, folder, ("dit",), method=method, mixed_precision="bf16")
    step = Step(plan)
    dit = step.model.components["dit"]
    frozen = [p for name, p in dit.named_parameters() if ".lora_" not in name]
    statistics = [buffer for layer in dit.modules() if isinstance(layer, StoredLinear) for buffer in layer.buffers()]
    taken = sum(tensor.nbytes for tensor in (*frozen, *statistics))
    assert frozen_bytes(plan, "dit", "bf16", method) == pytest.approx(taken, rel=0.03)
    quantized = step.gradients()
    step.model.zero_grad()
    assert dequantize(dit) > 10
    plain = step.gradients()
    assert quantized.keys() == plain.keys() and all(gradient.abs().max() > 0 for gradient in plain.values())
    assert cosine_similarity(flat(quantized), flat(plain), dim=0) > 0.9999


def test_activations_are_measured_through_every_format(folder):
    """They are those of plain weights."""
    plan = plan_step("qwen-image", folder)
    config = memory_config(plan, find_workload(plan).largest)
    found = {name: training_memory(plan, replace(config, storage={**config.storage, "dit": name})) for name in STORES}
    assert len({memory.activations for memory in found.values()}) == 1
    weights = {name: memory.weights["dit"] for name, memory in found.items()}
    assert weights["nf4"] < weights["float8"] < weights["fp8"] == weights["int8"] < weights["plain"]

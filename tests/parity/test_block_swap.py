"""Gradients of each family with blocks in host memory, against those with all weights on the device."""

import pytest
import torch

from diffsynth_core.adapters import swap as swapping
from diffsynth_core.adapters.swap import swaps_of
from diffsynth_core.models.shapes import layers_of_blocks
from tests.covering import covering
from tests.parity.float8_runs import RECIPES, Step, plan_step


@pytest.mark.parametrize(("family", "precision"), covering(RECIPES, ("no", "bf16")))
def test_gradients_are_those_of_weights_on_the_device(family, precision, folder, monkeypatch):
    given_back: list[int] = []
    monkeypatch.setattr(swapping, "give_back", lambda memory: given_back.append(1) or memory.fill_(0xFF))
    settings = {"mixed_precision": precision, "use_gradient_checkpointing": precision == "bf16"}
    plain = Step(plan_step(family, folder, **settings))
    plan = plan_step(family, folder, **settings, enable_model_cpu_offload=True, cpu_offload_split_threshold=0)
    swapped = Step(plan)
    (swap,) = swaps_of(swapped.model)
    waiting = {f"{name}.weight" for name in layers_of_blocks(plan.model.shapes["dit"])}
    named = dict(plain.model.components["dit"].named_parameters())
    frozen = {name.replace(".base_layer.", "."): weight for name, weight in named.items() if ".lora_" not in name}
    low = {name for name in waiting if not plan.model.facts.component("dit").stays_float32(name)}
    assert swap.host_bytes == pytest.approx(sum(frozen[name].nbytes for name in low), rel=0.05)
    ours, theirs = swapped.gradients(), plain.gradients()
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(gradient, theirs[name]) for name, gradient in ours.items())
    assert len(given_back) > len(low) / 2

"""Kinds of gradient checkpointing in each family: to the bit what a step computes that keeps all activations."""

from functools import cache

import pytest
import torch
from torch import Tensor

from tests.parity.float8_runs import Step, plan_step

FAMILIES = {
    "qwen-image": "qwen-image-{}",
    "wan": "wan2.1-t2v-1.3b-{}",
    "wan i2v": "wan2.1-i2v-14b-480p-{}",
    "flux": "flux.1-dev-{}",
    "flux2": "flux.2-klein-4b-{}",
}
QUICK = ("qwen-image", "flux")
STEPS = 8
KEPT = {"use_gradient_checkpointing": False, "use_gradient_checkpointing_offload": False, "mixed_precision": "no",
        "width": 160, "height": 128, "max_pixels": 160 * 128}  # fmt: skip
KINDS = ("nested", "keep_attention", "keep_every_2")


@pytest.fixture(scope="module")
def kept(folder):
    """Losses and gradients of steps that keep all activations, once."""
    return cache(lambda recipe: train(Step(plan_step(recipe, folder, **KEPT))))


def train(step: Step) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Losses and gradients of the first steps."""
    optimizer = torch.optim.SGD(step.model.trained().values(), lr=1e-2)
    seen = []
    for _ in range(STEPS):
        losses = step.model(step.micro_batch)
        losses.sum().backward()
        gradients = {
            name: weight.grad.clone() for name, weight in step.model.trained().items() if weight.grad is not None
        }
        seen.append((losses.detach(), gradients))
        optimizer.step()
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]
)
def test_losses_and_gradients_are_those_of_kept_activations(family, trained, kind, kept, folder):
    recipe = FAMILIES[family].format(trained)
    recomputed = KEPT | {"use_gradient_checkpointing": True, "checkpointing": kind}
    found, expected = train(Step(plan_step(recipe, folder, **recomputed))), kept(recipe)
    for (losses, gradients), (plain, theirs) in zip(found, expected, strict=True):
        assert torch.equal(losses, plain)
        assert gradients.keys() == theirs.keys() and gradients
        assert all(torch.equal(gradient, theirs[name]) for name, gradient in gradients.items())
    assert not torch.equal(expected[0][0], expected[-1][0])

"""Moving averages of weights, against those of diffusers."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim import SGD, AdamW

from diffsynth_core.optimizers.averaging import AveragedOptimizer, average_of, averages_in_place
from diffsynth_core.optimizers.stochastic_rounding import RoundedOptimizer
from tests.unit.optimizers.test_optimizers import trained

STEPS = 8


def take_step(weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for weight in weights.values():
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
    for group in optimizer.param_groups:
        group["update"] = step
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("decay", [0.3, 0.999], ids=["reached", "not reached"])
def test_averages_are_those_of_diffusers_and_change_no_weight(decay):
    """The formula reaches 0.3 after three steps, and 0.999 after none of these."""
    weights, others = trained(), trained()
    optimizer = AveragedOptimizer(AdamW(weights.values(), lr=0.1), decay)
    plain, expected = AdamW(others.values(), lr=0.1), EMAModel(others.values(), decay=decay)
    for step in range(STEPS):
        take_step(weights, optimizer, step)
        take_step(others, plain, step)
        expected.step(others.values())
        for weight, average in zip(weights.values(), expected.shadow_params, strict=True):
            torch.testing.assert_close(average_of(optimizer, weight), average, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    assert not any(torch.equal(average_of(optimizer, weight), weight) for weight in weights.values())


def in_bfloat16() -> tuple[dict[str, nn.Parameter], AveragedOptimizer]:
    weights = {name: nn.Parameter(weight.bfloat16()) for name, weight in trained().items()}
    return weights, AveragedOptimizer(RoundedOptimizer(lambda some: SGD(some, lr=0.01), weights, seed=0), 0.9)


def test_averages_of_bfloat16_are_float32():
    """They are of the rounded weights, and between two of those."""
    weights, optimizer = in_bfloat16()
    expected = {}
    for step in range(STEPS):
        take_step(weights, optimizer, step)
        share = (1 + step) / (10 + step)
        for name, weight in weights.items():
            before = expected.get(name, weight.double())
            expected[name] = share * before + (1 - share) * weight.detach().double()
    for name, weight in weights.items():
        average = average_of(optimizer, weight)
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-5)
        assert average.dtype == torch.float32 and not torch.equal(average, average.bfloat16().float())


def test_a_skipped_step_leaves_averages_as_they_are():
    weights = trained()
    optimizer, scaler = AveragedOptimizer(SGD(weights.values(), lr=0.1), 0.9), torch.amp.GradScaler("cpu")
    take_step(weights, optimizer, 0)
    before = {name: average_of(optimizer, weight).clone() for name, weight in weights.items()}
    scaler.scale(torch.ones(()))
    for weight in weights.values():
        weight.grad = torch.full_like(weight, torch.inf)
        weight.data += 1
    scaler.step(optimizer)
    assert all(torch.equal(average_of(optimizer, weight), before[name]) for name, weight in weights.items())


@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "bf16"])
def test_weights_are_their_averages_for_a_while(rounded):
    """They are what they were, to the bit and in the same memory, even after an error."""
    weights, optimizer = in_bfloat16() if rounded else (trained(), None)
    optimizer = optimizer or AveragedOptimizer(SGD(weights.values(), lr=0.1), 0.9)
    with averages_in_place(optimizer):
        pass  # before the first step, there are none
    for step in range(3):
        take_step(weights, optimizer, step)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    places = [weight.data_ptr() for weight in weights.values()]
    with pytest.raises(KeyboardInterrupt), averages_in_place(optimizer):
        for name, weight in weights.items():
            assert torch.equal(weight, average_of(optimizer, weight).to(weight.dtype))
            assert not torch.equal(weight, before[name])
        raise KeyboardInterrupt
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
    assert [weight.data_ptr() for weight in weights.values()] == places

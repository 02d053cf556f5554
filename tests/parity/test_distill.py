"""Direct distillation: loss and gradients equal those of a plain loop over the steps of diffusers' scheduler."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.testing import assert_close

from diffsynth_core.config.resolve import resolve
from diffsynth_core.models.registry import load_family
from diffsynth_core.planning.data.encodings import with_encodings
from diffsynth_core.planning.plan import make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.encode import fill_cache
from diffsynth_core.training.loader import iterate_micro_batches
from diffsynth_core.training.model import build_training_module
from diffsynth_core.training.setup import make_accelerator
from tests.covering import long_ones
from tests.kinds import KINDS, Kind, entries_of, inputs_of, lora, write_datasets, write_models
from tests.parity.conftest import SCHEDULER

MU = 0.8


def evenly(steps: int) -> list[float]:
    """Return the sigmas that diffusers' pipelines pass to their scheduler."""
    return list(np.linspace(1.0, 1 / steps, steps))


def qwen_image(steps: int) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    scheduler.set_timesteps(sigmas=evenly(steps), mu=MU)
    return scheduler


def wan(steps: int) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5)
    scheduler.set_timesteps(sigmas=evenly(steps))
    return scheduler


def flux(steps: int) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3)
    scheduler.set_timesteps(steps)
    return scheduler


def flux2(steps: int) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    scheduler.set_timesteps(sigmas=evenly(steps), mu=MU)
    return scheduler


SCHEDULERS: dict[str, Callable[[int], FlowMatchEulerDiscreteScheduler]] = {
    "qwen-image": qwen_image,
    "wan": wan,
    "flux": flux,
    "flux2": flux2,
}
PUBLISHED = {
    "qwen-image": [1, 0.77764, 0.47078, 0.02],
    "wan": [1, 0.9375, 0.83333, 0.625],
    "flux": [1, 0.85769, 0.60215, 0.00893],
    "flux2": [1, 0.86973, 0.68997, 0.42590],
}
"""Sigmas of four steps."""


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_sigmas_of_few_steps(family):
    assert [round(sigma, 5) for sigma in load_family(family).sigmas(4).tolist()] == PUBLISHED[family]
    for steps in (2, 4, 8, 30):
        expected = SCHEDULERS[family](steps).sigmas
        assert_close(load_family(family).sigmas(steps), expected[:-1], rtol=0, atol=1e-6)
        assert expected[-1] == 0
    assert load_family(family).sigmas(1).tolist() == [1.0]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory, photographs) -> dict[str, Path]:
    return write_datasets(tmp_path_factory.mktemp("distill"), photographs)


def plan_of(kind: Kind, models: Path, dataset: Path, **more: object):
    given = iter([*inputs_of(kind), *kind.sizes, *lora(kind)])
    flags = {str(flag).removeprefix("--"): value for flag, value in zip(given, given, strict=True)}
    flags |= {"task": "direct_distill", "dataset_base_path": str(dataset), "lora_rank": 4, "batch_size": 2}
    flags |= {"model_id_with_origin_paths": ",".join(entries_of(kind.recipe)), "device": "cpu", "output_path": "unused"}
    return make_plan(resolve(flags | more), SilentReporter(), base=models)


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.trained().items() if parameter.grad is not None}
    model.zero_grad()
    return found


def plain_loop(family, model, batch: dict[str, torch.Tensor], seeds: list[int], steps: int) -> torch.Tensor:
    """Sample as a pipeline does, without guidance; clean frames are restored before every step."""
    latents, given = batch["latents"], batch.get("given")
    shape = latents.shape[1:] if latents.shape[2] > 1 else (latents.shape[1], *latents.shape[3:])
    drawn = [torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    states = torch.cat(drawn).view(latents.shape)
    scheduler = SCHEDULERS[family.facts.name](steps)
    for timestep in scheduler.timesteps:
        if given is not None:
            states = given * latents + (1 - given) * states
        sigma = (timestep / 1000).expand(len(states))
        velocity = family.predict_velocity(dict(model.components.items()), states, sigma, batch)
        states = scheduler.step(velocity, timestep, states, return_dict=False)[0]
    first = 0 if given is None else 1
    return torch.nn.functional.mse_loss(states[:, :, first:], latents[:, :, first:])


@pytest.mark.parametrize("name", long_ones(KINDS, long=("qwen-edit", "wan-ti2v")))
def test_loss_and_gradients_are_those_of_a_plain_loop(name, models, datasets):
    kind = KINDS[name]
    plan = plan_of(kind, models, datasets[kind.data])
    family = load_family(plan.model.facts.name)
    plan, accelerator = with_encodings(plan, SilentReporter()), make_accelerator(plan)
    fill_cache(plan, family, accelerator, SilentReporter(), StopRequest())
    model = build_training_module(plan, family, accelerator.device, SilentReporter())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # LoRA starts with B = 0, which would hide the gradients of A
        for parameter in model.trained().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    micro_batch = max(iterate_micro_batches(plan, 0), key=lambda one: len(one.refs))
    settings = [plan.data.samples.samples[ref.sample].sampling for ref in micro_batch.refs]
    assert len(settings) == 2
    losses = model(micro_batch)
    losses.mean().backward()
    found = gradients(model)
    expected_loss = plain_loop(
        family, model, family.collate(micro_batch.encoded), [one.seed for one in settings], settings[0].steps
    )
    expected_loss.backward()
    expected = gradients(model)
    assert found.keys() == expected.keys() and all(gradient.abs().max() > 0 for gradient in expected.values())
    whole, error = (
        torch.cat([(value - subtracted).flatten() for value, subtracted in pairs]).norm()
        for pairs in (
            [(expected[one], torch.zeros_like(expected[one])) for one in expected],
            [(found[one], expected[one]) for one in expected],
        )
    )
    print(f"\n{name}: loss {losses.mean().item():.6f}, gradients differ by {float(error / whole):.2g} of their norm")
    assert_close(losses.mean(), expected_loss, rtol=1e-5, atol=1e-6)
    assert error / whole < 1e-5


def test_samples_of_other_numbers_of_steps_are_in_other_batches(models, datasets):
    plan = plan_of(KINDS["qwen-image"], models, datasets["images"], dataset_repeat=30)
    samples = plan.data.samples.samples
    seen = set()
    for number in range(plan.data.steps.batches.batches_per_epoch):
        steps = {samples[ref.sample].sampling.steps for ref in plan.data.steps.batches.batch(0, number)}
        assert len(steps) == 1
        seen |= steps
    assert seen == {3, 4}

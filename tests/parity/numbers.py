"""Recording and comparing numbers: one step of a pipeline, and a batch against its samples one by one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from diffsynth_core.models.family import Encoded
from diffsynth_core.training.objective import add_noise, velocity_loss
from tests.gradients import unused_parameters
from tests.parity.models import Ours

TOLERANCE = 1e-5


def difference(left: Tensor, right: Tensor) -> float:
    """Return the maximum absolute difference of two tensors of one shape."""
    assert left.shape == right.shape, (left.shape, right.shape)
    return float((left.double() - right.double()).detach().abs().max())


class OneStep(FlowMatchEulerDiscreteScheduler):
    """The scheduler of a pipeline, limited to a single step from a given sigma, `[1]`."""

    sigma: Tensor

    @classmethod
    def at(cls, sigma: Tensor) -> Self:
        scheduler = cls()
        scheduler.sigma = sigma
        return scheduler

    def set_timesteps(self, *_: Any, sigmas: Any = None, mu: Any = None, **__: Any) -> None:
        self.timesteps = self.sigma * 1000
        self.sigmas = torch.cat([self.sigma, torch.zeros(1)])
        self._step_index = self._begin_index = None


@contextmanager
def recorded(*modules: nn.Module) -> Iterator[list[tuple[dict[str, Any], Any]]]:
    """Record the named inputs and the output of each call of the modules, in call order."""
    calls: list[tuple[dict[str, Any], Any]] = []
    hooks = [
        module.register_forward_hook(
            lambda _, positional, named, output: calls.append((named, output)), with_kwargs=True
        )
        for module in modules
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def noise_for(latents: Tensor, seed: int) -> Tensor:
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(
    ours: Ours, samples: Sequence[Encoded], noise: Tensor, sigma: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the losses of a batch, and the gradients of their sum for all parameters of the transformer (0 if
    none).
    """
    batch = ours.family.collate(samples)
    given = batch.get("given")
    prediction = ours.predict(add_noise(batch["latents"], noise, sigma, given), sigma, batch)
    losses = velocity_loss(prediction, batch["latents"], noise, torch.ones(len(samples)), given)
    parameters = dict(ours.transformer.named_parameters())
    gradients = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True, materialize_grads=True)
    return losses.detach(), dict(zip(parameters, gradients, strict=True))


def check_batch_equals_singles(ours: Ours, samples: Sequence[Encoded]) -> None:
    """Check that a batch of four has the losses of its samples and the mean of their gradients, for all parameters
    in use.
    """
    noise = noise_for(torch.stack([sample["latents"] for sample in samples]), seed=4)
    sigma = torch.tensor([1.0, 0.9, 0.6, 0.1])
    ours.transformer.requires_grad_(True)
    try:
        together, gradients = loss_and_gradients(ours, samples, noise, sigma)
        singles = [loss_and_gradients(ours, [samples[n]], noise[[n]], sigma[[n]]) for n in range(4)]
    finally:
        ours.transformer.requires_grad_(False)
    apart = difference(together, torch.cat([losses for losses, _ in singles]))
    assert apart < TOLERANCE, f"losses differ by {apart:.1e}"
    means = {name: torch.stack([single[name] for _, single in singles]).mean(0) for name in gradients}
    worst = max(difference(gradient / 4, means[name]) for name, gradient in gradients.items())
    scale = max(float(gradient.abs().max()) / 4 for gradient in gradients.values())
    summary = f"gradients differ by {worst:.1e}, the largest is {scale:.1e}"
    print(summary)
    assert worst < TOLERANCE < scale / 100, summary
    dead = unused_parameters(ours.family.facts, "dit", ours.transformer, ours.variant)
    silent = {name for name, gradient in gradients.items() if not gradient.any()}
    assert silent == dead, f"other parameters than expected get no gradient: {sorted(silent ^ dead)}"

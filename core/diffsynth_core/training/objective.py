"""Flow matching: noise, timesteps, weights and loss, as pure functions of their keys."""

import torch
from torch import Tensor

from diffsynth_core.randomness import key_of

TABLE_SIZE = 1000


def timestep_weights(sigmas: Tensor) -> Tensor:
    """Loss weight of each training sigma, `[1000]` float32, mean 1.

    y = exp(-2 ((1000 sigma - 500) / 1000)^2); w = (y - min y) * 1000 / sum(y - min y): the bell-shaped weighting of
    DiffSynth-Studio. The noisiest sigma weighs 0.
    """
    bell = torch.exp(-2 * ((sigmas.double() * TABLE_SIZE - TABLE_SIZE / 2) / TABLE_SIZE) ** 2)
    raised = bell - bell.min()
    return (raised * (TABLE_SIZE / raised.sum())).float()


def draw_timestep(seed: int, epoch: int, sample: int, repeat: int, low: float = 0.0, high: float = 1.0) -> int:
    """Index into the table of sigmas, uniform in [floor(1000 low), floor(1000 high)), for one sample in one pass."""
    first, behind = int(low * TABLE_SIZE), int(high * TABLE_SIZE)
    return first + key_of("timestep", seed, epoch, sample, repeat) * (behind - first) // 2**64


def draw_noise(seed: int, epoch: int, sample: int, repeat: int, shape: torch.Size) -> Tensor:
    """Standard normal noise for one sample in one pass, float32, drawn on the CPU: every device gets the same."""
    generator = torch.Generator().manual_seed(key_of("noise", seed, epoch, sample, repeat))
    return torch.randn(shape, generator=generator)


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor, given: Tensor | None = None) -> Tensor:
    """x_t = (1 - sigma) x_0 + sigma noise; `sigma` `[B]`, the others `[B, …]`, all float32.

    Where `given` is 1 the latents stay clean; it is broadcast over them.
    """
    spread = sigma.view(-1, *[1] * (latents.ndim - 1))
    noisy = (1 - spread) * latents + spread * noise
    return noisy if given is None else torch.where(given.bool(), latents, noisy)


def velocity_loss(
    prediction: Tensor, latents: Tensor, noise: Tensor, weight: Tensor, given: Tensor | None = None
) -> Tensor:
    """Weighted mean squared error against noise - latents, in float32, per sample: `[B]`.

    The mean is over the latents that are not `given`.
    """
    squares = (prediction.float() - (noise - latents)).pow(2)
    if given is None:
        return squares.flatten(1).mean(1) * weight
    counted = (1 - given.float()).expand_as(squares)
    return (squares * counted).flatten(1).sum(1) / counted.flatten(1).sum(1) * weight

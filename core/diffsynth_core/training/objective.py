"""Objectives: the base class, and flow matching with its noise, weights and target."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffsynth_core.config.choices import TRAINING_TIMESTEPS
from diffsynth_core.data.sampling import Sampling
from diffsynth_core.host_memory import to_device
from diffsynth_core.models.family import Encoded
from diffsynth_core.randomness import key_of
from diffsynth_core.training.losses import Loss, sample_means, squared_error
from diffsynth_core.training.timesteps import Band, DrawKey, TimestepSampler

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_t `[B, C, F, H, W]` float32, sigma `[B]` float32) -> predicted noise - latents, in the shape of x_t."""


@dataclass(frozen=True)
class SampleDraw:
    """Key of the random numbers of one sample in one repeat of an epoch.

    Attributes:
        sampling: sampler parameters of the row, for objectives that run a sampler.
        band: the part of the timesteps that the timestep is drawn from; None: all.
    """

    seed: int
    epoch: int
    sample: int
    repeat: int
    sampling: Sampling | None = None
    band: Band | None = None

    @property
    def key(self) -> DrawKey:
        """The numbers that seed the draws."""
        return self.seed, self.epoch, self.sample, self.repeat


class Objective(nn.Module, ABC):
    """The loss to minimize, given a model that predicts velocities; has no trainable parameters."""

    @abstractmethod
    def forward(self, predict: Velocity, batch: Encoded, draws: Sequence[SampleDraw]) -> Tensor:
        """The loss of each sample, `[B]` float32.

        Args:
            predict: the model, for the samples of `batch`.
            batch: the output of the family's `collate`.
            draws: one for each sample of the batch.
        """


class FlowMatching(Objective):
    """`sft`: weighted error of the velocity at one random timestep."""

    def __init__(
        self,
        sigmas: Tensor,
        timesteps: range,
        draw_timestep: TimestepSampler,
        loss: Loss,
    ) -> None:
        """Create the objective.

        Args:
            sigmas: the family's table, `[1000]` float32.
            timesteps: indices into the table to train on.
        """
        super().__init__()
        self._timesteps, self._draw_timestep, self._loss = timesteps, draw_timestep, loss
        self.register_buffer("sigmas", sigmas, persistent=False)
        self.register_buffer("weights", timestep_weights(sigmas), persistent=False)
        self.sigmas: Tensor
        self.weights: Tensor

    def forward(self, predict: Velocity, batch: Encoded, draws: Sequence[SampleDraw]) -> Tensor:
        latents, clean_mask = batch["latents"].float(), batch.get("given")
        noise = torch.stack([draw_noise(*draw.key, shape=latents.shape[1:]) for draw in draws])
        noise = to_device(noise, latents.device)
        drawn = [
            self._draw_timestep(draw.key, draw.band.of(self._timesteps) if draw.band else self._timesteps)
            for draw in draws
        ]
        timesteps = to_device(torch.tensor(drawn), latents.device)
        sigma = self.sigmas[timesteps]
        prediction = predict(add_noise(latents, noise, sigma, clean_mask), sigma)
        return velocity_loss(prediction, latents, noise, self.weights[timesteps], clean_mask, self._loss)


def timestep_weights(sigmas: Tensor) -> Tensor:
    """Return the loss weight of each training sigma, `[1000]` float32, with mean 1.

    y = exp(-2 ((1000 sigma - 500) / 1000)^2); w = (y - min y) * 1000 / sum(y - min y): the bell-shaped weighting of
    DiffSynth-Studio. The noisiest sigma has weight 0.
    """
    bell = torch.exp(-2 * ((sigmas.double() * TRAINING_TIMESTEPS - TRAINING_TIMESTEPS / 2) / TRAINING_TIMESTEPS) ** 2)
    raised = bell - bell.min()
    return (raised * (TRAINING_TIMESTEPS / raised.sum())).float()


def draw_noise(seed: int, epoch: int, sample: int, repeat: int, shape: torch.Size) -> Tensor:
    """Draw standard normal noise, float32, on the CPU, so that it is the same on every device."""
    generator = torch.Generator().manual_seed(key_of("noise", seed, epoch, sample, repeat))
    return torch.randn(shape, generator=generator)


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor, clean_mask: Tensor | None = None) -> Tensor:
    """Return x_t = (1 - sigma) x_0 + sigma noise; `sigma` is `[B]`, the others `[B, …]`, all float32.

    Latents stay clean where `clean_mask`, which is broadcast, is 1.
    """
    spread = sigma.view(-1, *[1] * (latents.ndim - 1))
    noisy = (1 - spread) * latents + spread * noise
    return noisy if clean_mask is None else torch.where(clean_mask.bool(), latents, noisy)


def velocity_loss(
    prediction: Tensor,
    latents: Tensor,
    noise: Tensor,
    weight: Tensor,
    clean_mask: Tensor | None = None,
    loss: Loss = squared_error,
) -> Tensor:
    """Return the weighted mean loss against noise - latents, in float32, per sample: `[B]`.

    The mean excludes latents where `clean_mask` is 1.
    """
    return sample_means(loss(prediction.float() - (noise - latents)), clean_mask) * weight

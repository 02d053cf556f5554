"""Direct distillation: the few steps of a sampler, trained as one."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffsynth_core.data.sampling import Sampling
from diffsynth_core.host_memory import to_device
from diffsynth_core.models.family import Encoded
from diffsynth_core.training.losses import Loss, sample_means
from diffsynth_core.training.objective import Objective, SampleDraw, Velocity


class DirectDistillation(Objective):
    """`direct_distill`: error of the final latents of the few-step sampler, started from the noise of the sample's
    seed.

    Gradients flow through all steps; there is no guidance. Source: modelscope/DiffSynth-Studio,
    diffsynth/diffusion/loss.py, `DirectDistillLoss`.
    """

    def __init__(self, sigmas: Callable[[int], Tensor], loss: Loss) -> None:
        """Create the objective.

        Args:
            sigmas: number of steps -> sigmas of the sampler, `[steps]` float32, without the final 0.
        """
        super().__init__()
        self._sigmas, self._loss = sigmas, loss

    def forward(self, predict: Velocity, batch: Encoded, draws: Sequence[SampleDraw]) -> Tensor:
        latents, clean_mask = batch["latents"].float(), batch.get("given")
        samplings = [draw.sampling for draw in draws if draw.sampling]
        (steps,) = {sampling.steps for sampling in samplings}  # equal in a batch: a bucket has one number of steps
        noise = torch.stack([draw_sampler_noise(sampling, latents.shape[1:]) for sampling in samplings])
        states = to_device(noise, latents.device)
        for sigma, following in pairwise([*self._sigmas(steps).tolist(), 0.0]):
            if clean_mask is not None:
                states = torch.where(clean_mask.bool(), latents, states)
            velocity = predict(states, torch.full((len(states),), sigma, device=latents.device))
            states = states + (following - sigma) * velocity.float()
        return sample_means(self._loss(states - latents), clean_mask)


def draw_sampler_noise(sampling: Sampling, shape: torch.Size) -> Tensor:
    """Draw the noise of a pipeline for one sample: float32, on the device named in its row.

    Gives the same values as a pipeline that draws the same number of elements in another shape, such as without
    frames.
    """
    generator = torch.Generator(sampling.rand_device).manual_seed(sampling.seed)
    return torch.randn(shape, generator=generator, device=sampling.rand_device)

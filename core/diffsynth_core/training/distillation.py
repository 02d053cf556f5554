"""Direct distillation: the sampler's few steps, trained as one."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffsynth_core.data.sampling import Sampling
from diffsynth_core.models.family import Encoded
from diffsynth_core.training.objective import Objective, SampleDraw, Velocity, mean_square


class DirectDistillation(Objective):
    """`direct_distill`: the error of the latents that the few steps lead to from the noise of the sample's own seed.

    The gradient goes through every step; there is no guidance. Source: modelscope/DiffSynth-Studio,
    diffsynth/diffusion/loss.py, `DirectDistillLoss`.
    """

    def __init__(self, sigmas: Callable[[int], Tensor]) -> None:
        """Args:
        sigmas: those of a sampler of so many steps, `[steps]` float32, without the 0 behind them.
        """
        super().__init__()
        self._sigmas = sigmas

    def forward(self, predict: Velocity, batch: Encoded, draws: Sequence[SampleDraw]) -> Tensor:
        latents, given = batch["latents"].float(), batch.get("given")
        settings = [draw.sampling for draw in draws if draw.sampling]
        (steps,) = {sampling.steps for sampling in settings}  # those of one batch, as the samples of a bucket have them
        noise = torch.stack([draw_sampler_noise(sampling, latents.shape[1:]) for sampling in settings])
        states = noise.to(latents.device)
        for sigma, following in pairwise([*self._sigmas(steps).tolist(), 0.0]):
            if given is not None:
                states = torch.where(given.bool(), latents, states)
            velocity = predict(states, torch.full((len(states),), sigma, device=latents.device))
            states = states + (following - sigma) * velocity.float()
        return mean_square(states - latents, given)


def draw_sampler_noise(sampling: Sampling, shape: torch.Size) -> Tensor:
    """The noise that a pipeline draws for one sample: float32, on the device that its row names.

    The numbers are those of a pipeline that draws them in another shape of as many elements, such as without frames.
    """
    generator = torch.Generator(sampling.rand_device).manual_seed(sampling.seed)
    return torch.randn(shape, generator=generator, device=sampling.rand_device)

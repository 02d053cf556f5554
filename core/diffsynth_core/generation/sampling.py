"""Sampling, for any family: from noise to latents, and to pixels."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffsynth_core.config.choices import TRAINING_TIMESTEPS
from diffsynth_core.models.family import Encoded, Family
from diffsynth_core.models.size_facts import StepSizes
from diffsynth_core.models.spec import Variant
from diffsynth_core.planning.drawing.jobs import GenerationJob

Predict = Callable[[Tensor, Tensor, Sequence[Encoded]], list[Tensor]]
"""(latents `[1, C, F, h, w]` float32, sigma `[1]` float32, batches) -> predicted noise - latents with each of them."""


def draw_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Draw the noise that sampling starts from, float32, on the CPU, so that it is the same on every device.

    Gives the values of a pipeline of diffusers with `generator=torch.Generator("cpu").manual_seed(seed)` in float32.
    """
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed))


class Sampler:
    """The latents of one image or clip, and how far they are."""

    def __init__(
        self, family: Family, variant: Variant, seed: int, steps: int, shape: Sequence[int], device: torch.device
    ) -> None:
        """Draw the noise.

        Args:
            shape: of the latents, `[1, C, F, h, w]`.
        """
        self._family = family
        self._scheduler = family.scheduler(variant, steps, shape)
        self._timesteps: list[Tensor] = list(self._scheduler.timesteps)
        self.latents = draw_noise(seed, shape).to(device)

    def steps_above(self, boundary: float) -> int:
        """Return how many of the remaining steps have a sigma of at least `boundary`."""
        return sum(bool(timestep >= boundary * TRAINING_TIMESTEPS) for timestep in self._timesteps)

    def denoise(
        self, predict: Predict, batch: Encoded, negative: Encoded | None, cfg_scale: float, boundary: float = 0.0
    ) -> Iterator[None]:
        """Denoise while sigma is at least `boundary`; yield after each step.

        Latents where `given` is 1 are those of the batch, before each prediction and at the end.

        Args:
            batch: the output of `collate` for one sample.
            negative: the same with the negative prompt; None: without classifier-free guidance.
        """
        for _ in range(self.steps_above(boundary)):
            self._step(predict, self._timesteps.pop(0), batch, negative, cfg_scale)
            yield
        self.latents = hold_clean(self.latents, batch)

    @torch.no_grad()
    def _step(
        self, predict: Predict, timestep: Tensor, batch: Encoded, negative: Encoded | None, cfg_scale: float
    ) -> None:
        states = hold_clean(self.latents, batch)
        sigma = (timestep.float() / TRAINING_TIMESTEPS).reshape(1).to(states.device)
        batches = [batch] if negative is None else [batch, negative]
        velocity, *others = (one.float() for one in predict(states, sigma, batches))
        for other in others:
            velocity = self._family.guide(velocity, other, cfg_scale)
        (self.latents,) = self._scheduler.step(velocity, timestep, self.latents, return_dict=False)


def hold_clean(latents: Tensor, batch: Encoded) -> Tensor:
    """Return latents with those of the batch where its mask `given` is 1."""
    clean_mask = batch.get("given")
    return latents if clean_mask is None else torch.where(clean_mask.bool(), batch["latents"].float(), latents)


def start_sampler(family: Family, variant: Variant, denoiser: Any, job: GenerationJob, device: torch.device) -> Sampler:
    """Return the sampler of a job before its first step."""
    sizes = StepSizes(batch=1, images=((job.num_frames, job.height, job.width),), text_tokens=0)
    blank = family.blank_encoding(variant, denoiser, sizes)
    return Sampler(family, variant, job.seed, job.steps, (1, *blank["latents"].shape), device)


def batch_of(family: Family, encoded: Encoded, job: GenerationJob, device: torch.device) -> Encoded:
    """Return the encodings of a job as a batch on the device, with the input of the guidance embedder."""
    batch = family.collate([{name: tensor.to(device) for name, tensor in encoded.items()}])
    return batch if job.guidance is None else {**batch, "guidance": torch.tensor([job.guidance], device=device)}


def predict_velocities(
    family: Family, components: Mapping[str, Any], noisy: Tensor, sigma: Tensor, batches: Sequence[Encoded]
) -> list[Tensor]:
    """Return the velocity with the prompt and, if there are two batches, with the negative one; a `Predict`."""
    shared = family.shared_by_prompts(components, noisy, sigma, batches[0])
    return [family.predict_velocity(components, noisy, sigma, {**one, **shared}) for one in batches]


@torch.no_grad()
def decode_pixels(family: Family, components: Mapping[str, Any], latents: Tensor) -> Tensor:
    """Return the pixels of the latents of one job, `[3, F, H, W]` float32 in [0, 1].

    Args:
        components: the decoder among them.
        latents: `[1, C, F', h, w]` float32.
    """
    pixels = family.decode(components, latents)[0]
    return (pixels / 2 + 0.5).clamp(0, 1)


def as_uint8(pixels: Tensor) -> NDArray[np.uint8]:
    """Return pixels `[3, F, H, W]` in [0, 1] as `[F, H, W, 3]` RGB on the host."""
    converted: NDArray[np.uint8] = (pixels * 255).round().byte().permute(1, 2, 3, 0).cpu().numpy()
    return converted

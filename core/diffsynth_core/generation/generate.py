"""Generating: prompts and images are encoded, the denoiser samples latents, the VAE decodes them."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from diffsynth_core.generation.job import GenerationJob, GenerationPlan
from diffsynth_core.progress import Reporter
from diffsynth_core.stop import StopRequest


def generate(
    plan: GenerationPlan, reporter: Reporter, stop: StopRequest
) -> Iterator[tuple[GenerationJob, NDArray[np.uint8]]]:
    """Yield each job with its pixels, `[F, H, W, 3]` RGB, in the order of the plan, as soon as it is generated.

    All prompts and images are encoded first, by one encoder component after the other, from the cache where it has
    them; then the denoiser is loaded, and the VAE beside it.

    Raises:
        DiffSynthError: if an image cannot be read, or an encoding contains NaN or Inf.
        Interrupted: if a stop is requested; between steps.
    """
    raise NotImplementedError

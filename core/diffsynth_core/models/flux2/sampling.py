"""Documented defaults for generating with FLUX.2 klein, and its published scheduler. No torch."""

from collections.abc import Mapping
from typing import Any

from diffsynth_core.models.spec import SamplingFacts

SCHEDULER: Mapping[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
"""The published scheduler_config.json."""
MANY_TOKENS = 4300
"""Number of tokens from which the shift depends on them alone."""

DISTILLED = SamplingFacts(steps=4, cfg_scale=1.0, height=1024, width=1024)
"""Source: the model cards of black-forest-labs/FLUX.2-klein-4B and -9B."""
BASE = SamplingFacts(steps=50, cfg_scale=4.0, height=1024, width=1024)
"""Source: the model cards of black-forest-labs/FLUX.2-klein-base-4B and -9B; their pipeline has the empty negative
prompt."""


def sampling(origin: str) -> SamplingFacts:
    """Return the defaults by the name of the denoiser's files: distilled and base models have the same shapes."""
    return BASE if "base" in origin.lower() else DISTILLED


def empirical_shift(tokens: int, steps: int) -> float:
    """Return mu of the sampler's sigmas by the number of tokens of the target and of steps.

    Lines through measurements at 10 and at 200 steps, interpolated in the steps. Source: `compute_empirical_mu` of
    diffusers' `Flux2KleinPipeline`.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > MANY_TOKENS:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190
    return at_200 + slope * (steps - 200)

"""Samplers of diffusers, with their timesteps set as the pipelines set them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from diffsynth_core.config.choices import TRAINING_TIMESTEPS


def euler(config: Mapping[str, Any], steps: int, mu: float) -> Any:
    """Return a `FlowMatchEulerDiscreteScheduler` whose sigmas are shifted by e^mu.

    The grid before the shift is linspace(1, 1 / steps, steps), that of the pipelines of Qwen-Image and FLUX.

    Args:
        config: the published scheduler_config.json; `use_dynamic_shifting` is true in it.
    """
    # One sigma cannot be both the first and, stretched to `shift_terminal`, the last: diffusers divides 0 by 0.
    config = config if steps > 1 else {**config, "shift_terminal": None}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    scheduler.set_begin_index(0)
    return scheduler


def unipc(steps: int, shift: float) -> Any:
    """Return a `UniPCMultistepScheduler` on flow matching, its sigmas shifted: s = shift s / (1 + (shift - 1) s)."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=TRAINING_TIMESTEPS,
        flow_shift=shift,
    )
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    return scheduler


def token_shift(tokens: int, config: Mapping[str, Any]) -> float:
    """Return mu, linear in the number of tokens of the target between the two points of a scheduler configuration.

    Source: `calculate_shift` of diffusers' `FluxPipeline` and `QwenImagePipeline`.
    """
    least, most = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (most - least)
    return float(tokens * slope + config["base_shift"] - slope * least)

"""Batches, sigmas and predictions of FLUX.2's transformer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffsynth_core.config.choices import TRAINING_TIMESTEPS
from diffsynth_core.models.flux2.captions import MAX_TOKENS
from diffsynth_core.models.flux2.encode import REFERENCE_LATENTS
from diffsynth_core.models.patches import blank_latents, numbered
from diffsynth_core.models.size_facts import StepSizes

SHIFT_MU = 0.8
"""Exponential shift of the training sigmas (shift = e^mu)."""
REFERENCE_POSITION = 10
"""Image position of the first reference image, and the distance between them; the target is at 0."""


def sigmas(steps: int = TRAINING_TIMESTEPS) -> Tensor:
    """Return the sigmas of a sampler, `[steps]` float32; the 1000 of training go from 1 down to 0.002223.

    s = linspace(1, 1 / steps, steps); e^mu / (e^mu + 1/s - 1) (`FlowMatchEulerDiscreteScheduler.time_shift` of
    diffusers).
    """
    base = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    return (math.exp(SHIFT_MU) / (math.exp(SHIFT_MU) + 1 / base - 1)).float()


def blank_encoding(transformer: Any, sizes: StepSizes) -> dict[str, Tensor]:
    """What the encoders make of a sample of these sizes, without its values."""
    target, *references = (blank_latents(transformer.config.in_channels, 16, image) for image in sizes.images)
    text = torch.empty(MAX_TOKENS, transformer.config.joint_attention_dim, dtype=transformer.dtype)
    shown = {REFERENCE_LATENTS.format(number): latents for number, latents in enumerate(references)}
    return {"latents": target, "prompt_embeds": text, **shown}


def predict_velocity(transformer: Any, noisy: Tensor, sigma: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Call the transformer as `Flux2KleinPipeline` does: reference images as additional tokens, timestep = sigma.

    Args:
        noisy: `[B, 128, 1, h, w]` float32.
        sigma: `[B]` float32.
        batch: `prompt_embeds` `[B, 512, 3 x width]`: texts always have 512 tokens, so nothing is padded; and the
            latents of reference images `[B, 128, 1, h', w']`.

    Returns:
        `[B, 128, 1, h, w]`.
    """
    _, _, _, height, width = noisy.shape
    images = [noisy, *numbered(batch, REFERENCE_LATENTS)]
    (prediction,) = transformer(
        hidden_states=torch.cat([pack(image.float()) for image in images], dim=1).to(input_dtype(transformer)),
        timestep=sigma,
        guidance=None,
        encoder_hidden_states=batch["prompt_embeds"].to(transformer.dtype),
        txt_ids=text_positions(batch["prompt_embeds"].shape[1], noisy.device),
        img_ids=image_positions(images),
        return_dict=False,
    )
    return unpack(prediction[:, : height * width], height, width)


def input_dtype(transformer: Any) -> torch.dtype:
    """Return the dtype of the tokens, to which the transformer rounds the timestep: float32 if that is the compute
    dtype.

    Under autocast the first layer casts tokens itself, so that sigma need not be rounded with them.
    """
    dtype: torch.dtype = transformer.dtype
    device = transformer.device.type
    # The meta device has no autocast of its own; what measures memory on it switches that of the CPU on.
    return torch.float32 if torch.is_autocast_enabled("cpu" if device == "meta" else device) else dtype


def pack(latents: Tensor) -> Tensor:
    """Return latents as tokens: `[B, C, 1, h, w]` -> `[B, h w, C]` (`Flux2KleinPipeline._pack_latents`)."""
    return latents.flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Invert `pack`: `[B, h w, C]` -> `[B, C, 1, h, w]`."""
    batch, _, channels = tokens.shape
    return tokens.transpose(1, 2).reshape(batch, channels, 1, height, width)


def text_positions(length: int, device: torch.device) -> Tensor:
    """Return the positions (image, row, column, text) of text tokens, `[L, 4]`: only the last one counts up."""
    positions = torch.zeros(length, 4, dtype=torch.int64, device=device)
    positions[:, 3] = torch.arange(length, device=device)
    return positions


def image_positions(images: Sequence[Tensor]) -> Tensor:
    """Return the positions (image, row, column, text) of the tokens of target and reference images, `[N, 4]`."""
    parts = []
    for number, latents in enumerate(images):
        height, width = latents.shape[-2:]
        axes = [torch.arange(length, device=latents.device) for length in (height, width, 1)]
        image = torch.full((1,), number * REFERENCE_POSITION, device=latents.device)
        parts.append(torch.cartesian_prod(image, *axes))
    return torch.cat(parts)

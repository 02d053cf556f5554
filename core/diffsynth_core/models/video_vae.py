"""Latents of the causal video VAEs of Qwen-Image and Wan, normalized per channel."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def encode_normalized(vae: Any, clips: Sequence[Tensor]) -> Tensor:
    """Return the means of the VAE's posteriors, normalized: clips of one shape, each `[3, F, H, W]` in [-1, 1] ->
    `[B, C, n + 1, h, w]` float32.

    F = 4n + 1.
    """
    # A single one is not copied: a clip may take gigabytes.
    batch = clips[0][None] if len(clips) == 1 else torch.stack(list(clips))
    latents: Tensor = vae.encode(batch.to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, std = _statistics(vae, latents.device)
    return (latents - mean) / std


def decode_normalized(vae: Any, latents: Tensor) -> Tensor:
    """Return the pixels of normalized latents: `[B, C, n + 1, h, w]` -> `[B, 3, F, H, W]` float32 in [-1, 1]."""
    mean, std = _statistics(vae, latents.device)
    scaled = latents / (1 / std) + mean  # as the pipelines write it, which rounds otherwise than `latents * std`
    pixels: Tensor = vae.decode(scaled.to(vae.device, vae.dtype)).sample
    return pixels.float().clamp(-1, 1)


def _statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the latents' channels, each `[C, 1, 1, 1]`."""
    mean, std = (
        torch.tensor(values, device=device).view(-1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std

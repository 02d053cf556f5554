"""Batches of image latents, and their tokens: patches of 2 x 2."""

from collections.abc import Mapping, Sequence
from itertools import count, takewhile

import torch
from torch import Tensor

from diffsynth_core.models.size_facts import MediaSize


def stack_samples(encoded: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack encoded samples of one shape, including texts and reference images: `[B, …]` of each `[…]`."""
    return {name: torch.stack([sample[name] for sample in encoded]) for name in encoded[0]}


def pack(latents: Tensor) -> Tensor:
    """Return 2 x 2 patches as tokens: `[B, C, 1, h, w]` -> `[B, (h/2)(w/2), 4C]`.

    Source: `_pack_latents` of diffusers' `QwenImagePipeline` and `FluxPipeline`.
    """
    batch, channels, _, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2)  # [B, C, h/2, 2, w/2, 2]
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Invert `pack`: `[B, (h/2)(w/2), 4C]` -> `[B, C, 1, h, w]`."""
    batch, _, channels = tokens.shape
    patches = tokens.view(batch, height // 2, width // 2, channels // 4, 2, 2)  # [B, h/2, w/2, C, 2, 2]
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, 1, height, width)


def numbered(batch: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """Return the tensors of a batch named `name` with 0, 1, … inserted, in this order."""
    return [batch[found] for found in takewhile(batch.__contains__, map(name.format, count()))]


def blank_latents(channels: int, factor: int, size: MediaSize, frame_step: int = 1) -> Tensor:
    """Return latents of an image or clip, `[C, F, h, w]` float32, with undefined values.

    Args:
        factor: pixels per latent, along a side.
        frame_step: frames per latent frame.
    """
    frames, height, width = size
    return torch.empty(channels, (frames - 1) // frame_step + 1, height // factor, width // factor)

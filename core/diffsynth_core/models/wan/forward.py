"""Batches, sigmas and predictions of Wan's transformer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffsynth_core.config.choices import TRAINING_TIMESTEPS
from diffsynth_core.models.patches import blank_latents
from diffsynth_core.models.size_facts import StepSizes
from diffsynth_core.models.spec import Variant
from diffsynth_core.models.wan.captions import MAX_TOKENS
from diffsynth_core.models.wan.sizes import FRAMES_PER_LATENT

SHIFT = 5.0
"""Shift of the training sigmas."""
STACKED = ("latents", "condition", "image_embeds", "given")


def sigmas(steps: int = TRAINING_TIMESTEPS) -> Tensor:
    """Return the sigmas of a sampler, `[steps]` float32; the 1000 of training go from 1 down to 0.00498.

    s = linspace(1, 0, steps + 1) without the last; 5 s / (1 + 4 s) (`FlowMatchEulerDiscreteScheduler` of diffusers
    with shift 5).
    """
    base = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    return (SHIFT * base / (1 + (SHIFT - 1) * base)).float()


def collate(encoded: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Combine encoded samples of one latent shape into a batch.

    Returns:
        `prompt_embeds` `[B, 512, 4096]`, zero after each caption; and as far as the samples have them `latents` `[B,
        C, F, h, w]`, `condition` `[B, 20, F, h, w]`, `image_embeds` `[B, 257 N, 1280]`, `given` `[B, 1, F, 1, 1]`.
    """
    texts = [pad(text, (0, 0, 0, MAX_TOKENS - len(text))) for text in (sample["prompt_embeds"] for sample in encoded)]
    batch = {"prompt_embeds": torch.stack(texts)}
    return batch | {name: torch.stack([sample[name] for sample in encoded]) for name in STACKED if name in encoded[0]}


def blank_encoding(variant: Variant, transformer: Any, sizes: StepSizes) -> dict[str, Tensor]:
    """What the encoders make of a sample of these sizes, without its values; outputs as of `collate`."""
    config, dtype = transformer.config, transformer.dtype
    factor = next(encoder.latents.factor for encoder in variant.encoders if encoder.latents)
    latents = blank_latents(config.out_channels, factor, sizes.images[0], FRAMES_PER_LATENT)
    sample = {"latents": latents, "prompt_embeds": torch.empty(MAX_TOKENS, config.text_dim, dtype=dtype)}
    if config.in_channels > config.out_channels:
        sample["condition"] = latents.new_empty(config.in_channels - config.out_channels, *latents.shape[1:])
    if variant.num_conditioning_frames:
        sample["given"] = latents.new_zeros(1, latents.shape[1], 1, 1)
    states = [encoder.states.count for encoder in variant.encoders if encoder.states]
    if states:
        sample["image_embeds"] = torch.empty(states[0], config.image_dim, dtype=dtype)
    return sample


def predict_velocity(transformer: Any, noisy: Tensor, sigma: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Call the transformer as diffusers' pipelines do: timestep = 1000 sigma, 0 for clean latents.

    Args:
        noisy: `[B, C, F, h, w]` float32.
        sigma: `[B]` float32.

    Returns:
        `[B, C, F, h, w]`.
    """
    states = torch.cat([noisy, batch["condition"].float()], dim=1) if "condition" in batch else noisy
    timestep = sigma * TRAINING_TIMESTEPS
    if "given" in batch:
        timestep = token_timesteps(timestep, batch["given"], noisy.shape, transformer.config.patch_size)
    images = batch.get("image_embeds")
    if images is not None:
        images = _one_by_one(images, transformer.config.pos_embed_seq_len).to(transformer.dtype)
    (prediction,) = transformer(
        hidden_states=states.to(transformer.dtype),
        timestep=timestep,
        encoder_hidden_states=batch["prompt_embeds"].to(transformer.dtype),
        encoder_hidden_states_image=images,
        return_dict=False,
    )
    return prediction  # type: ignore[no-any-return]


def token_timesteps(timestep: Tensor, given: Tensor, shape: Sequence[int], patch_size: Sequence[int]) -> Tensor:
    """Return a timestep for every token, 0 for those of clean latents: `[B]` -> `[B, F (h / 2) (w / 2)]`."""
    _, _, frames, height, width = shape
    by_frame = timestep[:, None] * (1 - given.float().view(len(timestep), frames))  # [B, F]
    return by_frame.repeat_interleave((height // patch_size[1]) * (width // patch_size[2]), dim=1)


def _one_by_one(images: Tensor, two_images_tokens: int | None) -> Tensor:
    """Return the states of two images as a batch of images, as the transformer for two images expects."""
    if two_images_tokens is None:
        return images
    return images.reshape(-1, two_images_tokens // 2, images.shape[-1])

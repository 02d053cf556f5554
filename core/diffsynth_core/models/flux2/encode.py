"""Encoding of captions and images for FLUX.2, as in diffusers' `Flux2KleinPipeline`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffsynth_core.models.family import Encoded, Encoder, name_references
from diffsynth_core.models.flux2.captions import MAX_TOKENS
from diffsynth_core.models.flux2.keys import TEXT_LAYERS
from diffsynth_core.models.spec import EncoderFacts
from diffsynth_core.models.tokens import Tokens, stack_tokens, tokenize

REFERENCE_LATENTS = "edit_latents_{}"
"""Name of the latents of a reference image, numbered from 0."""


def apply_template(tokenizer: Any, caption: str) -> str:
    """Format a caption as a user message, followed by the start of an answer without thinking."""
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return text


def tokenize_caption(components: Mapping[str, Any], caption: str) -> Tokens:
    """Tokenize a caption in its template, padded to 512 tokens."""
    tokenizer = components["tokenizer_path"]
    return tokenize(tokenizer, apply_template(tokenizer, caption), MAX_TOKENS, padded=True)


def encode_text(encoder: EncoderFacts, components: Mapping[str, Any], captions: Sequence[Tokens]) -> list[Encoded]:
    """Encode captions with Qwen3.

    Returns:
        `prompt_embeds` of each: hidden states after layers 9, 18 and 27, `[512, 3 x width]` in the text encoder's
            dtype.
    """
    text_encoder = components[encoder.component]
    ids, mask = stack_tokens(captions, text_encoder.device)
    states = text_encoder.model(
        input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
    ).hidden_states
    return [{"prompt_embeds": one} for one in torch.cat([states[layer] for layer in TEXT_LAYERS], dim=-1)]


def encode_latents(encoder: EncoderFacts, components: Mapping[str, Any], targets: Sequence[Tensor]) -> list[Encoded]:
    """Encode images of one shape: the means of the VAE's posteriors in 2 x 2 patches, normalized with the VAE's running
    statistics.

    Args:
        targets: each `[3, 1, H, W]` in [-1, 1], H and W multiples of 16.

    Returns:
        `latents` of each: `[128, 1, H / 16, W / 16]` float32.
    """
    return [{"latents": latents} for latents in _latents(components[encoder.component], targets)]


def encode_references(
    encoder: EncoderFacts, components: Mapping[str, Any], references: Sequence[Sequence[Tensor]]
) -> list[Encoded]:
    """Encode the reference images of samples to `edit_latents_0`, `edit_latents_1` …, in order, as in
    `encode_latents`; sizes may differ within a sample.
    """
    vae = components[encoder.component]
    encoded = [_latents(vae, images) for images in zip(*references, strict=True)]
    return name_references(encoded, REFERENCE_LATENTS, len(references))


def _latents(vae: Any, images: Sequence[Tensor]) -> Tensor:
    frames = [image[None, :, 0] for image in images]  # [1, 3, H, W] each
    batch = frames[0] if len(frames) == 1 else torch.cat(frames)  # a copy may have another layout, and other kernels
    latents = patchify(vae.encode(batch.to(vae.device, vae.dtype)).latent_dist.mode().float())
    mean, std = _statistics(vae)
    return ((latents - mean) / std)[:, :, None]


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Return the VAE's running mean and standard deviation of patches, each `[1, 4C, 1, 1]` float32."""
    mean = vae.bn.running_mean.float().view(1, -1, 1, 1)
    variance = vae.bn.running_var.float().view(1, -1, 1, 1)
    return mean, torch.sqrt(variance + vae.config.batch_norm_eps)


def patchify(latents: Tensor) -> Tensor:
    """Move 2 x 2 patches into channels: `[B, C, h, w]` -> `[B, 4C, h/2, w/2]`.

    Source: `_patchify_latents` of diffusers' `Flux2KleinPipeline`.
    """
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2)  # [B, C, h/2, 2, w/2, 2]
    return patches.permute(0, 1, 3, 5, 2, 4).reshape(batch, channels * 4, height // 2, width // 2)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents, the inverse of `encode_latents`; shapes as in `Family.decode`."""
    mean, std = _statistics(vae)
    pixels: Tensor = vae.decode(unpatchify(latents[:, :, 0] * std + mean).to(vae.device, vae.dtype)).sample
    return pixels.float().clamp(-1, 1)[:, :, None]


def unpatchify(latents: Tensor) -> Tensor:
    """Invert `patchify`: `[B, 4C, h/2, w/2]` -> `[B, C, h, w]`."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels // 4, 2, 2, height, width)  # [B, C, 2, 2, h/2, w/2]
    return patches.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels // 4, height * 2, width * 2)


ENCODERS = {
    "text": Encoder(
        encode_text,
        tokenize_caption,
        f"captions are truncated to {MAX_TOKENS} tokens, template included",
        batched=True,
    ),
    "latents": Encoder(encode_latents, batched=True),
    "edit_image": Encoder(encode_references, batched=True),
}
"""Name -> encoder; spec.py has the facts."""

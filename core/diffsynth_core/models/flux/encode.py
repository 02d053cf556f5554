"""Encoding of captions and images for FLUX.1, as in diffusers' `FluxPipeline` and `FluxKontextPipeline`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffsynth_core.models.control import CONTROL_LATENTS
from diffsynth_core.models.family import Encoded, Encoder, name_references
from diffsynth_core.models.flux.captions import CLIP_TOKENS, T5_TOKENS
from diffsynth_core.models.spec import EncoderFacts
from diffsynth_core.models.tokens import Tokens, stack_tokens, tokenize

KONTEXT_LATENTS = "kontext_latents_{}"
"""Name of the latents of a reference image, numbered from 0 within its row."""


def tokenize_for_clip(components: Mapping[str, Any], caption: str) -> Tokens:
    """Tokenize a caption for CLIP."""
    return tokenize(components["tokenizer_1_path"], caption, CLIP_TOKENS, padded=True)


def encode_pooled_text(
    encoder: EncoderFacts, components: Mapping[str, Any], captions: Sequence[Tokens]
) -> list[Encoded]:
    """Encode captions with CLIP.

    Returns:
        `pooled_prompt_embeds` of each: the state at the end of the caption, `[768]` in the text encoder's dtype.
    """
    text_encoder = components[encoder.component]
    ids, _ = stack_tokens(captions, text_encoder.device)
    return [{"pooled_prompt_embeds": state} for state in text_encoder(ids).pooler_output]


def tokenize_for_t5(components: Mapping[str, Any], caption: str) -> Tokens:
    """Tokenize a caption for T5."""
    return tokenize(components["tokenizer_2_path"], caption, T5_TOKENS, padded=True)


def encode_text(encoder: EncoderFacts, components: Mapping[str, Any], captions: Sequence[Tokens]) -> list[Encoded]:
    """Encode captions and their padding with T5.

    Returns:
        `prompt_embeds` of each: last hidden states, `[512, 4096]` in the text encoder's dtype.
    """
    text_encoder = components[encoder.component]
    ids, _ = stack_tokens(captions, text_encoder.device)
    return [{"prompt_embeds": states} for states in text_encoder(ids).last_hidden_state]


def encode_latents(encoder: EncoderFacts, components: Mapping[str, Any], targets: Sequence[Tensor]) -> list[Encoded]:
    """Encode images of one shape: the means of the VAE's posteriors, shifted and scaled.

    Args:
        targets: each `[3, 1, H, W]` in [-1, 1], H and W multiples of 16.

    Returns:
        `latents` of each: `[16, 1, H / 8, W / 8]` float32.
    """
    return [{"latents": latents} for latents in _latents(components[encoder.component], targets)]


def encode_references(
    encoder: EncoderFacts, components: Mapping[str, Any], references: Sequence[Sequence[Tensor]]
) -> list[Encoded]:
    """Encode the reference images of samples as in `encode_latents`; sizes may differ within a sample.

    Returns:
        `kontext_latents_0`, `kontext_latents_1` … of each: `[16, 1, H / 8, W / 8]` float32.
    """
    vae = components[encoder.component]
    encoded = [_latents(vae, images) for images in zip(*references, strict=True)]
    return name_references(encoded, KONTEXT_LATENTS, len(references))


def encode_controlnet_latents(
    encoder: EncoderFacts, components: Mapping[str, Any], shown: Sequence[Sequence[Tensor]]
) -> list[Encoded]:
    """Encode the image of a ControlNet of each sample, which has the size of the target.

    Returns:
        `controlnet_latents` of each: `[16, 1, H / 8, W / 8]` float32.
    """
    images = [image for (image,) in shown]
    return [{CONTROL_LATENTS: latents} for latents in _latents(components[encoder.component], images)]


def _latents(vae: Any, images: Sequence[Tensor]) -> Tensor:
    frames = [image.movedim(1, 0) for image in images]  # [1, 3, H, W] each
    batch = frames[0] if len(frames) == 1 else torch.cat(frames)  # a copy may have another layout, and other kernels
    latents: Tensor = vae.encode(batch.to(vae.device, vae.dtype)).latent_dist.mode().float()
    return ((latents - vae.config.shift_factor) * vae.config.scaling_factor)[:, :, None]  # type: ignore[no-any-return]


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents, the inverse of `encode_latents`; shapes as in `Family.decode`."""
    scaled = latents[:, :, 0] / vae.config.scaling_factor + vae.config.shift_factor
    pixels: Tensor = vae.decode(scaled.to(vae.device, vae.dtype)).sample
    return pixels.float().clamp(-1, 1)[:, :, None]


ENCODERS = {
    "text_1": Encoder(
        encode_pooled_text,
        tokenize_for_clip,
        f"captions are truncated to {CLIP_TOKENS} tokens for CLIP ({T5_TOKENS} for T5)",
        batched=True,
    ),
    "text_2": Encoder(encode_text, tokenize_for_t5, f"captions are truncated to {T5_TOKENS} tokens", batched=True),
    "latents": Encoder(encode_latents, batched=True),
    "kontext_latents": Encoder(encode_references, batched=True),
    CONTROL_LATENTS: Encoder(encode_controlnet_latents, batched=True),
}
"""Name -> encoder; spec.py has the facts."""

"""Encoding of captions and images for FLUX.1, as in diffusers' `FluxPipeline` and `FluxKontextPipeline`."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from diffsynth_core.models.control import CONTROL_LATENTS
from diffsynth_core.models.flux.captions import CLIP_TOKENS, T5_TOKENS

KONTEXT_LATENTS = "kontext_latents_{}"
"""Name of the latents of a reference image, numbered from 0 within its row."""


def encode_pooled_text(components: Mapping[str, Any], caption: str) -> dict[str, Tensor]:
    """Encode a caption with CLIP.

    Returns:
        `pooled_prompt_embeds`: the state at the end of the caption, `[768]` in the text encoder's dtype.
    """
    text_encoder = components["text_encoder_1"]
    tokens = _padded(components["tokenizer_1_path"], caption, CLIP_TOKENS).to(text_encoder.device)
    return {"pooled_prompt_embeds": text_encoder(tokens).pooler_output[0]}


def encode_text(components: Mapping[str, Any], caption: str) -> dict[str, Tensor]:
    """Encode a caption and its padding with T5.

    Returns:
        `prompt_embeds`: last hidden states, `[512, 4096]` in the text encoder's dtype.
    """
    text_encoder = components["text_encoder_2"]
    tokens = _padded(components["tokenizer_2_path"], caption, T5_TOKENS).to(text_encoder.device)
    return {"prompt_embeds": text_encoder(tokens).last_hidden_state[0]}


def _padded(tokenizer: Any, caption: str, length: int) -> Tensor:
    """Return the token ids of a caption, `[1, length]`."""
    tokens = tokenizer([caption], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids  # type: ignore[no-any-return]


def truncation_warning(components: Mapping[str, Any], encoder: str, caption: str) -> str | None:
    """Return a warning about a caption that an encoder truncates, or None."""
    if encoder == "text_1":
        long = _is_longer(components["tokenizer_1_path"], caption, CLIP_TOKENS)
        return f"captions are truncated to {CLIP_TOKENS} tokens for CLIP ({T5_TOKENS} for T5)" if long else None
    long = _is_longer(components["tokenizer_2_path"], caption, T5_TOKENS)
    return f"captions are truncated to {T5_TOKENS} tokens" if long else None


def _is_longer(tokenizer: Any, caption: str, length: int) -> bool:
    return len(tokenizer(caption, verbose=False)["input_ids"]) > length


def encode_latents(vae: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Encode an image: the mean of the VAE's posterior, shifted and scaled.

    Args:
        pixels: `[3, 1, H, W]` in [-1, 1], H and W multiples of 16.

    Returns:
        `latents`: `[16, 1, H / 8, W / 8]` float32.
    """
    return {"latents": _latents(vae, pixels)}


def encode_references(vae: Any, images: Sequence[Tensor]) -> dict[str, Tensor]:
    """Encode reference images as in `encode_latents`.

    Returns:
        `kontext_latents_0`, `kontext_latents_1` …: `[16, 1, H / 8, W / 8]` float32.
    """
    return {KONTEXT_LATENTS.format(number): _latents(vae, pixels) for number, pixels in enumerate(images)}


def encode_controlnet_latents(vae: Any, image: Tensor) -> dict[str, Tensor]:
    """Encode the image of a ControlNet, which has the size of the target.

    Returns:
        `controlnet_latents`: `[16, 1, H / 8, W / 8]` float32.
    """
    return {CONTROL_LATENTS: _latents(vae, image)}


def _latents(vae: Any, pixels: Tensor) -> Tensor:
    batch = pixels.movedim(1, 0).to(vae.device, vae.dtype)  # [1, 3, H, W]
    latents = vae.encode(batch).latent_dist.mode().float()
    return ((latents - vae.config.shift_factor) * vae.config.scaling_factor).movedim(0, 1)  # type: ignore[no-any-return]

"""What FLUX.1's frozen encoders make of a caption and of images, as diffusers' `FluxPipeline` and
`FluxKontextPipeline` do it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from diffsynth_core.models.control import CONTROL_LATENTS
from diffsynth_core.models.flux.captions import CLIP_TOKENS, T5_TOKENS

KONTEXT_LATENTS = "kontext_latents_{}"
"""Name of the latents of a reference image, with its number in the row, from 0."""


def encode_pooled_text(components: Mapping[str, Any], caption: str) -> dict[str, Tensor]:
    """State of CLIP at the end of the caption.

    Returns: `pooled_prompt_embeds`, `[768]` in the text encoder's dtype.
    """
    text_encoder = components["text_encoder_1"]
    tokens = _padded(components["tokenizer_1_path"], caption, CLIP_TOKENS).to(text_encoder.device)
    return {"pooled_prompt_embeds": text_encoder(tokens).pooler_output[0]}


def encode_text(components: Mapping[str, Any], caption: str) -> dict[str, Tensor]:
    """Last hidden states of T5 over the caption and its padding.

    Returns: `prompt_embeds`, `[512, 4096]` in the text encoder's dtype.
    """
    text_encoder = components["text_encoder_2"]
    tokens = _padded(components["tokenizer_2_path"], caption, T5_TOKENS).to(text_encoder.device)
    return {"prompt_embeds": text_encoder(tokens).last_hidden_state[0]}


def _padded(tokenizer: Any, caption: str, length: int) -> Tensor:
    """Token numbers of one caption, `[1, length]`."""
    tokens = tokenizer([caption], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids  # type: ignore[no-any-return]


def caption_left_out(components: Mapping[str, Any], encoder: str, caption: str) -> str | None:
    """Words for a caption whose end an encoder does not read, None for one that is read whole."""
    if encoder == "text_1":
        long = _is_longer(components["tokenizer_1_path"], caption, CLIP_TOKENS)
        return f"captions are truncated to {CLIP_TOKENS} tokens for CLIP ({T5_TOKENS} for T5)" if long else None
    long = _is_longer(components["tokenizer_2_path"], caption, T5_TOKENS)
    return f"captions are truncated to {T5_TOKENS} tokens" if long else None


def _is_longer(tokenizer: Any, caption: str, length: int) -> bool:
    return len(tokenizer(caption, verbose=False)["input_ids"]) > length


def encode_latents(vae: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Mean of the VAE's posterior, shifted and scaled.

    Args:
        pixels: `[3, 1, H, W]` in [-1, 1], H and W multiples of 16.

    Returns: `latents`, `[16, 1, H / 8, W / 8]` float32.
    """
    return {"latents": _latents(vae, pixels)}


def encode_references(vae: Any, images: Sequence[Tensor]) -> dict[str, Tensor]:
    """The latents of each image that the model is shown, as `encode_latents` makes them.

    Returns: `kontext_latents_0`, `kontext_latents_1`, ..., `[16, 1, H / 8, W / 8]` float32.
    """
    return {KONTEXT_LATENTS.format(number): _latents(vae, pixels) for number, pixels in enumerate(images)}


def encode_controlnet_latents(vae: Any, image: Tensor) -> dict[str, Tensor]:
    """The latents of the image to follow, which has the size of what is trained on.

    Returns: `controlnet_latents`, `[16, 1, H / 8, W / 8]` float32.
    """
    return {CONTROL_LATENTS: _latents(vae, image)}


def _latents(vae: Any, pixels: Tensor) -> Tensor:
    batch = pixels.movedim(1, 0).to(vae.device, vae.dtype)  # [1, 3, H, W]
    latents = vae.encode(batch).latent_dist.mode().float()
    return ((latents - vae.config.shift_factor) * vae.config.scaling_factor).movedim(0, 1)  # type: ignore[no-any-return]

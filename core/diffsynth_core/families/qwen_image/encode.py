"""What Qwen-Image's frozen encoders make of a caption and of a picture, as diffusers' `QwenImagePipeline` does it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PROMPT_TEMPLATE = (
    "<|im_start|>system\n"
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DROPPED_TOKENS = 34
"""Tokens of the system message, whose states the model never sees."""
MAX_TOKENS = 1024
"""Text tokens kept behind the dropped ones."""


def encode_text(components: Mapping[str, Any], caption: str) -> dict[str, Tensor]:
    """Last hidden states of Qwen2.5-VL over the templated caption.

    Returns: `prompt_embeds`, `[L, 3584]` in the text encoder's dtype, L at most 1024.
    """
    text_encoder = components["text_encoder"]
    tokens = components["tokenizer_path"](
        [PROMPT_TEMPLATE.format(caption)],
        max_length=MAX_TOKENS + DROPPED_TOKENS,
        truncation=True,
        return_tensors="pt",
    ).to(text_encoder.device)
    states = text_encoder.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False)
    return {"prompt_embeds": states.last_hidden_state[0, DROPPED_TOKENS:]}


def caption_left_out(components: Mapping[str, Any], caption: str) -> str | None:
    """Words for a caption whose end is cut off, None for one that is taken whole."""
    tokens = components["tokenizer_path"](PROMPT_TEMPLATE.format(caption))["input_ids"]
    return f"captions are cut after {MAX_TOKENS} tokens" if len(tokens) > MAX_TOKENS + DROPPED_TOKENS else None


def encode_latents(vae: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Mean of the VAE's posterior, normalised channel by channel.

    Args:
        pixels: `[3, F, H, W]` in [-1, 1], H and W multiples of 16.

    Returns: `latents`, `[16, (F - 1) / 4 + 1, H / 8, W / 8]` float32.
    """
    posterior = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist
    latents = posterior.mode()[0].float()
    mean, std = (
        torch.tensor(values, device=latents.device).view(-1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return {"latents": (latents - mean) / std}

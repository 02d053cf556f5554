"""What Qwen-Image's frozen encoders make of captions and images, as diffusers' `QwenImagePipeline`,
`QwenImageEditPipeline` and `QwenImageEditPlusPipeline` do it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.control import CONTROL_LATENTS
from diffsynth_core.models.qwen_image.captions import (
    DROPPED_EDIT_TOKENS,
    DROPPED_TOKENS,
    EDIT_TEMPLATE,
    MAX_EDIT_TOKENS,
    MAX_TOKENS,
    PROMPT_TEMPLATE,
)
from diffsynth_core.models.qwen_image.forward import EDIT_LATENTS

IMAGE_TOKEN = "<|image_pad|>"


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


def encode_edit_text(
    components: Mapping[str, Any], caption: str, images: Sequence[Tensor], announced: str
) -> dict[str, Tensor]:
    """Last hidden states of Qwen2.5-VL over the caption behind the images to edit, which stand where text does.

    Tokens of images are placed in height and width, as in the training of the published models. transformers does it
    when it is told which tokens they are (`mm_token_type_ids`); diffusers 0.42 does not tell transformers 5, which
    then counts them like words (issue 14194 of diffusers).

    Args:
        images: each `[3, 1, H, W]` in [-1, 1].
        announced: what stands for each in the prompt (`CaptionFacts.announced`).

    Returns: `prompt_embeds`, `[L, 3584]` in the text encoder's dtype.

    Raises:
        DiffSynthError: when caption and images are too long.
    """
    text_encoder, processor = components["text_encoder"], components["processor_path"]
    shown = processor(images=[_to_bytes(image) for image in images], return_tensors="pt").to(text_encoder.device)
    counts = (shown.image_grid_thw.prod(dim=1) // processor.merge_size**2).tolist()
    text = EDIT_TEMPLATE.format(announce_images(counts, announced) + caption)
    tokens = components["tokenizer_path"]([text], return_tensors="pt").to(text_encoder.device)
    length = tokens.input_ids.shape[1] - DROPPED_EDIT_TOKENS
    if length > MAX_EDIT_TOKENS:
        raise DiffSynthError(
            f"a caption has {length} tokens with its images ({sum(counts)} of them), but the model takes {MAX_EDIT_TOKENS}: "
            f"`{caption[:60]}`",
            "shorten the caption, or use fewer images",
        )
    states = text_encoder.model(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        pixel_values=shown.pixel_values,
        image_grid_thw=shown.image_grid_thw,
        mm_token_type_ids=(tokens.input_ids == text_encoder.config.image_token_id).int(),
        use_cache=False,
    )
    return {"prompt_embeds": states.last_hidden_state[0, DROPPED_EDIT_TOKENS:]}


def announce_images(counts: Sequence[int], announced: str) -> str:
    """What stands for images of so many tokens each in the prompt."""
    return "".join(
        announced.format(number=number, image=IMAGE_TOKEN * count) for number, count in enumerate(counts, start=1)
    )


def _to_bytes(image: Tensor) -> NDArray[np.uint8]:
    """`[3, 1, H, W]` in [-1, 1] -> `[H, W, 3]` in 0..255."""
    values = ((image[:, 0] + 1) * 127.5).round().to(torch.uint8)
    return values.permute(1, 2, 0).cpu().numpy()


def caption_left_out(components: Mapping[str, Any], caption: str) -> str | None:
    """Words for a caption whose end is cut off, None for one that is taken whole."""
    tokens = components["tokenizer_path"](PROMPT_TEMPLATE.format(caption))["input_ids"]
    return f"captions are truncated to {MAX_TOKENS} tokens" if len(tokens) > MAX_TOKENS + DROPPED_TOKENS else None


def encode_latents(vae: Any, pixels: Tensor) -> dict[str, Tensor]:
    """The latents that are trained on.

    Args:
        pixels: `[3, F, H, W]` in [-1, 1], H and W multiples of 16.

    Returns: `latents`, `[16, (F - 1) / 4 + 1, H / 8, W / 8]` float32.
    """
    return {"latents": _normalised_latents(vae, pixels)}


def encode_edit_latents(vae: Any, images: Sequence[Tensor]) -> dict[str, Tensor]:
    """The latents of the images to edit, whose sizes may differ.

    Returns: `edit_latents_0`, `edit_latents_1` … in their order, each `[16, 1, h, w]` float32.
    """
    return {EDIT_LATENTS.format(number): _normalised_latents(vae, image) for number, image in enumerate(images)}


def encode_controlnet_latents(vae: Any, image: Tensor) -> dict[str, Tensor]:
    """The latents of the image to follow, which has the size of what is trained on.

    Returns: `controlnet_latents`, `[16, 1, H / 8, W / 8]` float32.
    """
    return {CONTROL_LATENTS: _normalised_latents(vae, image)}


def _normalised_latents(vae: Any, pixels: Tensor) -> Tensor:
    """Mean of the VAE's posterior, normalised channel by channel."""
    posterior = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist
    latents: Tensor = posterior.mode()[0].float()
    mean, std = (
        torch.tensor(values, device=latents.device).view(-1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / std

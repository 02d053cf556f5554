"""Encoding of captions and images for Qwen-Image.

As in diffusers' `QwenImagePipeline`, `QwenImageEditPipeline` and `QwenImageEditPlusPipeline`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.control import CONTROL_LATENTS
from diffsynth_core.models.family import Encoded, Encoder, name_references
from diffsynth_core.models.qwen_image.captions import (
    DROPPED_EDIT_TOKENS,
    DROPPED_TOKENS,
    EDIT_TEMPLATE,
    MAX_EDIT_TOKENS,
    MAX_TOKENS,
    PROMPT_TEMPLATE,
)
from diffsynth_core.models.qwen_image.forward import EDIT_LATENTS
from diffsynth_core.models.spec import EncoderFacts
from diffsynth_core.models.tokens import Tokens, stack_tokens, tokenize
from diffsynth_core.models.video_vae import encode_normalized

IMAGE_TOKEN = "<|image_pad|>"
"""Placeholder token of an image."""


def tokenize_caption(components: Mapping[str, Any], caption: str) -> Tokens:
    """Tokenize a caption in its template."""
    return tokenize(components["tokenizer_path"], PROMPT_TEMPLATE.format(caption), MAX_TOKENS + DROPPED_TOKENS)


def encode_text(encoder: EncoderFacts, components: Mapping[str, Any], captions: Sequence[Tokens]) -> list[Encoded]:
    """Encode captions of as many tokens each with Qwen2.5-VL.

    Returns:
        `prompt_embeds` of each: last hidden states, `[L, 3584]` in the text encoder's dtype, L <= 1024.
    """
    text_encoder = components[encoder.component]
    ids, mask = stack_tokens(captions, text_encoder.device)
    states = text_encoder.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return [{"prompt_embeds": one} for one in states[:, DROPPED_TOKENS:]]


def encode_edit_text(
    encoder: EncoderFacts, components: Mapping[str, Any], caption: str, images: Sequence[Tensor]
) -> Encoded:
    """Encode the reference images and the caption with Qwen2.5-VL, image tokens first.

    Image tokens have positions in height and width, as in the training of the published models. transformers assigns
    them if it receives `mm_token_type_ids`; diffusers 0.42 does not pass these to transformers 5, which then numbers
    image tokens like words (diffusers issue 14194).

    Args:
        images: each `[3, 1, H, W]` in [-1, 1].

    Returns:
        `prompt_embeds`: last hidden states, `[L, 3584]` in the text encoder's dtype.

    Raises:
        DiffSynthError: if caption and images have too many tokens.
    """
    assert encoder.caption
    text_encoder, processor = components[encoder.component], components["processor_path"]
    shown = processor(images=[_to_bytes(image) for image in images], return_tensors="pt").to(text_encoder.device)
    counts = (shown.image_grid_thw.prod(dim=1) // processor.merge_size**2).tolist()
    text = EDIT_TEMPLATE.format(announce_images(counts, encoder.caption.announced) + caption)
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
    """Return the prompt text for images with the given numbers of tokens."""
    return "".join(
        announced.format(number=number, image=IMAGE_TOKEN * count) for number, count in enumerate(counts, start=1)
    )


def _to_bytes(image: Tensor) -> NDArray[np.uint8]:
    """Convert `[3, 1, H, W]` in [-1, 1] to `[H, W, 3]` in 0..255."""
    values = ((image[:, 0] + 1) * 127.5).round().to(torch.uint8)
    return values.permute(1, 2, 0).cpu().numpy()


def encode_latents(encoder: EncoderFacts, components: Mapping[str, Any], targets: Sequence[Tensor]) -> list[Encoded]:
    """Encode targets of one shape.

    Args:
        targets: each `[3, F, H, W]` in [-1, 1], H and W multiples of 16.

    Returns:
        `latents` of each: `[16, (F - 1) / 4 + 1, H / 8, W / 8]` float32.
    """
    return [{"latents": latents} for latents in encode_normalized(components[encoder.component], targets)]


def encode_edit_latents(
    encoder: EncoderFacts, components: Mapping[str, Any], references: Sequence[Sequence[Tensor]]
) -> list[Encoded]:
    """Encode the reference images of samples, whose sizes may differ within a sample.

    Returns:
        `edit_latents_0`, `edit_latents_1` … of each: in order, each `[16, 1, h, w]` float32.
    """
    vae = components[encoder.component]
    encoded = [encode_normalized(vae, images) for images in zip(*references, strict=True)]
    return name_references(encoded, EDIT_LATENTS, len(references))


def encode_controlnet_latents(
    encoder: EncoderFacts, components: Mapping[str, Any], shown: Sequence[Sequence[Tensor]]
) -> list[Encoded]:
    """Encode the image of a ControlNet of each sample, which has the size of the target.

    Returns:
        `controlnet_latents` of each: `[16, 1, H / 8, W / 8]` float32.
    """
    images = [image for (image,) in shown]
    return [{CONTROL_LATENTS: latents} for latents in encode_normalized(components[encoder.component], images)]


ENCODERS = {
    "text": Encoder(encode_text, tokenize_caption, f"captions are truncated to {MAX_TOKENS} tokens", batched=True),
    "edit_text": Encoder(encode_edit_text),
    "edit_plus_text": Encoder(encode_edit_text),
    "latents": Encoder(encode_latents, batched=True),
    "edit_latents": Encoder(encode_edit_latents, batched=True),
    CONTROL_LATENTS: Encoder(encode_controlnet_latents, batched=True),
}
"""Name -> encoder; variants.py has the facts.

Captions with images are encoded one by one: the processor must read the images before their number of tokens is known.
"""

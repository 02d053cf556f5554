"""Encoding of captions and clips for Wan, as in diffusers' `WanPipeline` and `WanImageToVideoPipeline`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffsynth_core.models.family import Encoded, Encoder
from diffsynth_core.models.spec import EncoderFacts
from diffsynth_core.models.tokens import Tokens, stack_tokens, tokenize
from diffsynth_core.models.video_vae import encode_normalized
from diffsynth_core.models.wan.captions import MAX_TOKENS, clean_caption
from diffsynth_core.models.wan.sizes import FRAMES, FRAMES_PER_LATENT


def tokenize_caption(components: Mapping[str, Any], caption: str) -> Tokens:
    """Clean and tokenize a caption."""
    return tokenize(components["tokenizer_path"], clean_caption(caption), MAX_TOKENS)


def encode_text(encoder: EncoderFacts, components: Mapping[str, Any], captions: Sequence[Tokens]) -> list[Encoded]:
    """Encode captions of as many tokens each with UMT5.

    Returns:
        `prompt_embeds` of each: last hidden states, `[L, 4096]` in the text encoder's dtype, L <= 512.
    """
    text_encoder = components[encoder.component]
    states = text_encoder(*stack_tokens(captions, text_encoder.device)).last_hidden_state
    return [{"prompt_embeds": one} for one in states]


def encode_latents(encoder: EncoderFacts, components: Mapping[str, Any], clips: Sequence[Tensor]) -> list[Encoded]:
    """Encode clips of one shape: the means of the VAE's posteriors, normalized per channel.

    Args:
        clips: each `[3, F, H, W]` in [-1, 1], F = 4n + 1.

    Returns:
        `latents` of each: `[C, n + 1, h, w]` float32.
    """
    return [{"latents": latents} for latents in encode_normalized(components[encoder.component], clips)]


def encode_with_clean_first_frame(
    encoder: EncoderFacts, components: Mapping[str, Any], clips: Sequence[Tensor]
) -> list[Encoded]:
    """Encode clips whose first frame stays clean as the condition (TI2V).

    Returns:
        `latents` as in `encode_latents`; `given`: mask of the clean latents, `[1, n + 1, 1, 1]`.
    """
    encoded = encode_latents(encoder, components, clips)
    given = torch.zeros(1, encoded[0]["latents"].shape[1], 1, 1)
    given[:, 0] = 1
    return [one | {"given": given} for one in encoded]


def encode_with_condition(
    encoder: EncoderFacts, components: Mapping[str, Any], clips: Sequence[Tensor]
) -> list[Encoded]:
    """Encode clips of one shape, and their conditioning frames with their mask as additional channels (I2V).

    Args:
        encoder: its inputs are the conditioning frames: `input_image` (first), `end_image` (last).
        clips: each `[3, F, H, W]` in [-1, 1], F = 4n + 1.

    Returns:
        `latents` as in `encode_latents`; `condition` of each: mask and latents, `[4 + C, n + 1, h, w]` float32.
    """
    vae, shown = components[encoder.component], encoder.inputs
    kept = [torch.zeros_like(clip) for clip in clips]
    for alone, clip in zip(kept, clips, strict=True):
        for frame in conditioning_frames(shown):
            alone[:, frame] = clip[:, frame]
    latents = encode_normalized(vae, kept)
    mask = conditioning_mask(clips[0].shape[1], shown).to(latents.device)
    spread = mask[:, :, None, None].expand(-1, -1, *latents.shape[3:])
    # Clips that have nothing else, such as those to be generated, are not encoded again; meta tensors do not say.
    same = all(not clip.is_meta and torch.equal(alone, clip) for alone, clip in zip(kept, clips, strict=True))
    targets = latents if same else encode_normalized(vae, clips)
    return [
        {"latents": target, "condition": torch.cat([spread, condition])}
        for target, condition in zip(targets, latents, strict=True)
    ]


def conditioning_frames(shown: tuple[str, ...]) -> list[int]:
    """Return the indices of the conditioning frames."""
    return [FRAMES[name] for name in shown]


def conditioning_mask(frames: int, shown: tuple[str, ...]) -> Tensor:
    """Return the mask of conditioning frames, `[4, (F - 1) / 4 + 1]`: four frames per latent frame, the first one
    repeated.
    """
    mask = torch.zeros(frames)
    mask[conditioning_frames(shown)] = 1
    filled = torch.cat([mask[:1].repeat(FRAMES_PER_LATENT), mask[1:]])
    return filled.view(-1, FRAMES_PER_LATENT).T


def encode_image(encoder: EncoderFacts, components: Mapping[str, Any], clips: Sequence[Tensor]) -> list[Encoded]:
    """Encode conditioning frames with CLIP.

    Args:
        encoder: its inputs are those whose frames are encoded; if it has none, the first frame is.
        clips: each `[3, F, H, W]` in [-1, 1].

    Returns:
        `image_embeds` of each: hidden states before the last layer, of N frames one after the other, `[257 N, 1280]` in
            the image encoder's dtype.
    """
    from transformers import CLIPImageProcessorPil

    image_encoder = components[encoder.component]
    frames = conditioning_frames(encoder.inputs) or [0]
    shown = torch.cat([clip[:, frames].movedim(0, -1) for clip in clips])  # [B N, H, W, 3]
    images = ((shown + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    inputs = CLIPImageProcessorPil()(images=list(images), return_tensors="pt")
    values = inputs["pixel_values"].to(image_encoder.device, image_encoder.dtype)
    states = image_encoder(values, output_hidden_states=True).hidden_states[-2]
    return [{"image_embeds": one.flatten(0, 1)} for one in states.split(len(frames))]


ENCODERS = {
    "text": Encoder(encode_text, tokenize_caption, f"captions are truncated to {MAX_TOKENS} tokens", batched=True),
    "latents": Encoder(encode_latents, batched=True),
    "latents_with_first_given": Encoder(encode_with_clean_first_frame, batched=True),
    "latents_with_condition": Encoder(encode_with_condition, batched=True),
    "image": Encoder(encode_image, batched=True),
}
"""Name -> encoder; spec.py has the facts."""

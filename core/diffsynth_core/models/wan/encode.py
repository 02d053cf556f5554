"""What Wan's frozen encoders make of a caption and of a clip, as diffusers' `WanPipeline` and
`WanImageToVideoPipeline` do it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffsynth_core.models.wan.captions import MAX_TOKENS, clean_caption
from diffsynth_core.models.wan.memory import FRAMES_PER_LATENT


def encode_text(components: Mapping[str, Any], caption: str) -> dict[str, Tensor]:
    """Last hidden states of UMT5 over the cleaned caption.

    Returns: `prompt_embeds`, `[L, 4096]` in the text encoder's dtype, L at most 512.
    """
    text_encoder = components["text_encoder"]
    tokens = components["tokenizer_path"](
        [clean_caption(caption)], max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).to(text_encoder.device)
    states = text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return {"prompt_embeds": states[0]}


def caption_left_out(components: Mapping[str, Any], caption: str) -> str | None:
    """Words for a caption whose end is cut off, None for one that is taken whole."""
    tokens = components["tokenizer_path"](clean_caption(caption))["input_ids"]
    return f"captions are truncated to {MAX_TOKENS} tokens" if len(tokens) > MAX_TOKENS else None


def encode_latents(vae: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Mean of the VAE's posterior, normalised channel by channel.

    Args:
        pixels: `[3, F, H, W]` in [-1, 1], F = 4n + 1.

    Returns: `latents`, `[C, n + 1, h, w]` float32.
    """
    latents = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist.mode()[0].float()
    mean, std = (
        torch.tensor(values, device=latents.device).view(-1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return {"latents": (latents - mean) / std}


def encode_with_first_given(vae: Any, pixels: Tensor) -> dict[str, Tensor]:
    """The latents of a clip whose first frame is shown by standing clean among them (TI2V).

    Returns: as `encode_latents`; `given`, `[1, n + 1, 1, 1]`, 1 for the latents that stay clean.
    """
    encoded = encode_latents(vae, pixels)
    given = torch.zeros(1, encoded["latents"].shape[1], 1, 1)
    given[:, 0] = 1
    return encoded | {"given": given}


def encode_with_condition(vae: Any, pixels: Tensor, shown: tuple[str, ...]) -> dict[str, Tensor]:
    """The latents of a clip, and those of its shown frames alone with their mask, for further channels (I2V).

    Args:
        pixels: `[3, F, H, W]` in [-1, 1], F = 4n + 1.
        shown: of `input_image` (the first frame) and `end_image` (the last).

    Returns: as `encode_latents`; `condition`, `[4 + C, n + 1, h, w]` float32, the mask first.
    """
    kept = torch.zeros_like(pixels)
    for frame in shown_frames(shown):
        kept[:, frame] = pixels[:, frame]
    latents = encode_latents(vae, kept)["latents"]
    mask = shown_mask(pixels.shape[1], shown).to(latents.device)
    spread = mask[:, :, None, None].expand(-1, -1, *latents.shape[2:])
    return encode_latents(vae, pixels) | {"condition": torch.cat([spread, latents])}


def shown_frames(shown: tuple[str, ...]) -> list[int]:
    """Which frames of a clip the extra inputs are: the first, the last."""
    return [{"input_image": 0, "end_image": -1}[name] for name in shown]


def shown_mask(frames: int, shown: tuple[str, ...]) -> Tensor:
    """1 for the frames that are shown, four to a latent frame, the first of them four times: `[4, (F - 1) / 4 + 1]`."""
    mask = torch.zeros(frames)
    mask[shown_frames(shown)] = 1
    filled = torch.cat([mask[:1].repeat(FRAMES_PER_LATENT), mask[1:]])
    return filled.view(-1, FRAMES_PER_LATENT).T


def encode_image(image_encoder: Any, pixels: Tensor, shown: tuple[str, ...]) -> dict[str, Tensor]:
    """States of the shown frames before CLIP's last layer.

    Args:
        pixels: `[3, F, H, W]` in [-1, 1].
        shown: the extra inputs whose frames are encoded; without any, the first frame.

    Returns: `image_embeds`, `[257 N, 1280]` in the image encoder's dtype for N frames, one behind the other.
    """
    from transformers import CLIPImageProcessorPil

    frames = shown_frames(shown) or [0]
    images = ((pixels[:, frames] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)  # [N, H, W, 3]
    inputs = CLIPImageProcessorPil()(images=list(images.cpu().numpy()), return_tensors="pt")
    values = inputs["pixel_values"].to(image_encoder.device, image_encoder.dtype)
    states = image_encoder(values, output_hidden_states=True).hidden_states[-2]
    return {"image_embeds": states.flatten(0, 1)}

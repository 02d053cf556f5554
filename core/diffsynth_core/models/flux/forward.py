"""Batches, sigmas and predictions of FLUX.1's transformer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffsynth_core.config.choices import TRAINING_TIMESTEPS
from diffsynth_core.models.control import CONTROL_LATENTS, CONTROL_OUTPUTS, read_by_controlnet
from diffsynth_core.models.flux.captions import T5_TOKENS
from diffsynth_core.models.flux.encode import KONTEXT_LATENTS
from diffsynth_core.models.patches import blank_latents, numbered, pack, unpack
from diffsynth_core.models.size_facts import StepSizes
from diffsynth_core.models.spec import Variant

SHIFT = 3.0
"""Shift of the training sigmas."""
LAST_SIGMA = 0.003 / 1.002
"""End of the grid before the shift: 1/1000, shifted once itself."""
GUIDANCE = 1.0
"""Input of the guidance embedder in training: 1, at which the prediction is that of the data itself."""


def sigmas(steps: int = TRAINING_TIMESTEPS) -> Tensor:
    """Return the sigmas of a sampler, `[steps]` float32; the 1000 of training go from 1 down to 0.00893.

    s = linspace(1, 0.003 / 1.002, steps); 3 s / (1 + 2 s) (`FlowMatchEulerDiscreteScheduler.set_timesteps` of
    diffusers with shift 3).
    """
    base = torch.linspace(1, LAST_SIGMA, steps, dtype=torch.float64)
    return (SHIFT * base / (1 + (SHIFT - 1) * base)).float()


def token_ids(latents: Tensor, image: int) -> Tensor:
    """Return the positions of an image's tokens for the rotary embedding: image, row, column; `[(h/2)(w/2), 3]`
    float32.

    Source: `_prepare_latent_image_ids` of diffusers' `FluxPipeline`.
    """
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    ids = torch.zeros(rows, columns, 3, device=latents.device)
    ids[..., 0] = image
    ids[..., 1] = torch.arange(rows, device=ids.device)[:, None]
    ids[..., 2] = torch.arange(columns, device=ids.device)[None, :]
    return ids.flatten(0, 1)


def blank_encoding(variant: Variant, transformer: Any, sizes: StepSizes) -> dict[str, Tensor]:
    """What the encoders make of a sample of these sizes, without its values."""
    target, *references = (blank_latents(16, 8, image) for image in sizes.images)
    config, dtype = transformer.config, transformer.dtype
    followed = {CONTROL_LATENTS: target} if variant.step_components else {}
    shown = {KONTEXT_LATENTS.format(number): latents for number, latents in enumerate(references)}
    return {
        "latents": target,
        "pooled_prompt_embeds": torch.empty(config.pooled_projection_dim, dtype=dtype),
        "prompt_embeds": torch.empty(T5_TOKENS, config.joint_attention_dim, dtype=dtype),
        **followed,
        **shown,
    }


def predict_velocity(
    transformer: Any, noisy: Tensor, sigma: Tensor, batch: Mapping[str, Tensor], controlnet: Any = None
) -> Tensor:
    """Call the transformer as `FluxPipeline` and `FluxKontextPipeline` do: packed latents, timestep = sigma.

    The tokens of reference images follow those of the latents, all with image index 1. Source for several images:
    modelscope/DiffSynth-Studio, diffsynth/pipelines/flux_image.py, `FluxImageUnit_Kontext`.

    Args:
        noisy: `[B, 16, 1, h, w]` float32.
        sigma: `[B]` float32; the transformer itself rounds it to its compute dtype.
        batch: `pooled_prompt_embeds` `[B, 768]`, `prompt_embeds` `[B, 512, 4096]`, and for each reference image
            `kontext_latents_<n>` `[B, 16, 1, h, w]` with its own h and w. `controlnet_latents` have the size of
            `noisy`. `guidance` `[B]`, if it is not that of training.
        controlnet: called unless the batch has its outputs.

    Returns:
        `[B, 16, 1, h, w]`.
    """
    given, outputs = _inputs(noisy, sigma, batch), batch.get(CONTROL_OUTPUTS)
    if outputs is None and controlnet is not None:
        outputs = _call_controlnet(controlnet, given, batch)
    added, added_single = (None, None) if outputs is None else outputs
    (prediction,) = transformer(
        controlnet_block_samples=added,
        controlnet_single_block_samples=added_single,
        **_states_as(given, transformer),
    )
    *_, height, width = noisy.shape
    return unpack(prediction[:, : height // 2 * (width // 2)], height, width)


def control_outputs(controlnet: Any, noisy: Tensor, sigma: Tensor, batch: Mapping[str, Tensor]) -> Any:
    """Return what a ControlNet adds to the blocks of the transformer, and to those of single streams.

    Inputs are as of `predict_velocity`.
    """
    return _call_controlnet(controlnet, _inputs(noisy, sigma, batch), batch)


def _call_controlnet(controlnet: Any, given: Mapping[str, Any], batch: Mapping[str, Tensor]) -> Any:
    """Call a ControlNet as in `FluxControlNetPipeline`, at scale 1; without a guidance embedder it gets no guidance."""
    inputs = {
        **given,
        "guidance": given["guidance"] if controlnet.config.guidance_embeds else None,
        "pooled_projections": read_by_controlnet(batch, "pooled_prompt_embeds"),
        "encoder_hidden_states": read_by_controlnet(batch, "prompt_embeds"),
    }
    followed = pack(batch[CONTROL_LATENTS]).to(controlnet.dtype)
    return controlnet(controlnet_cond=followed, **_states_as(inputs, controlnet))


def _inputs(noisy: Tensor, sigma: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what transformer and ControlNet both take."""
    shown = numbered(batch, KONTEXT_LATENTS)
    states = torch.cat([pack(noisy), *(pack(image) for image in shown)], dim=1)
    ids = torch.cat([token_ids(noisy, 0), *(token_ids(image, 1) for image in shown)])
    text = batch["prompt_embeds"]
    return {
        "hidden_states": states,
        "timestep": sigma,
        "guidance": batch["guidance"] if "guidance" in batch else torch.full_like(sigma, GUIDANCE),
        "pooled_projections": batch["pooled_prompt_embeds"],
        "encoder_hidden_states": text,
        "txt_ids": torch.zeros(text.shape[1], 3, device=text.device),
        "img_ids": ids,
        "return_dict": False,
    }


def _states_as(given: dict[str, Any], module: Any) -> dict[str, Any]:
    """Return inputs with the states among them in the dtype of the module that reads them."""
    states = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    return {**given, **{name: given[name].to(module.dtype) for name in states}}

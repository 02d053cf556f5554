"""Batches, sigmas and predictions of Qwen-Image's transformer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffsynth_core.config.choices import TRAINING_TIMESTEPS
from diffsynth_core.host_memory import to_device
from diffsynth_core.models.control import CONTROL_LATENTS, CONTROL_OUTPUTS, read_by_controlnet
from diffsynth_core.models.patches import blank_latents, numbered, pack, unpack
from diffsynth_core.models.size_facts import StepSizes
from diffsynth_core.models.spec import Variant

SHIFT_MU = 0.8
"""Exponential shift of the training sigmas (shift = e^mu)."""
LAST_SIGMA = 0.02
"""`shift_terminal` of the published scheduler configuration."""
EDIT_LATENTS = "edit_latents_{}"
"""Name of the latents of a reference image, numbered from 0."""


def sigmas(steps: int = TRAINING_TIMESTEPS) -> Tensor:
    """Return the sigmas of a sampler, `[steps]` float32; the 1000 of training go from 1 down to 0.02.

    s = linspace(1, 0, steps + 1) without the last; e^mu / (e^mu + 1/s - 1); then 1 - sigma is stretched so that the
    last is 0.02 (`FlowMatchEulerDiscreteScheduler.time_shift` and `stretch_shift_to_terminal` of diffusers).
    """
    base = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    shifted = math.exp(SHIFT_MU) / (math.exp(SHIFT_MU) + 1 / base - 1)
    if steps == 1:
        return shifted.float()  # one sigma cannot be both the first and the last
    stretch = (1 - shifted[-1]) / (1 - LAST_SIGMA)
    return (1 - (1 - shifted) / stretch).float()


def collate(encoded: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Combine encoded samples of one latent shape into a batch.

    Returns:
        `latents` `[B, 16, 1, h, w]`, those of reference and control images likewise, each in its size; `prompt_embeds`
        `[B, L, 3584]`, padded with zeros to the longest, and, if lengths differ, `prompt_mask` `[B, L]` bool, True for
        tokens.
    """
    texts = [sample["prompt_embeds"] for sample in encoded]
    stacked = [name for name in encoded[0] if name != "prompt_embeds"]
    batch = {name: torch.stack([sample[name] for sample in encoded]) for name in stacked}
    batch["prompt_embeds"] = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = [len(text) for text in texts]
    if min(lengths) < max(lengths):
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        batch["prompt_mask"] = to_device(mask, batch["prompt_embeds"].device)
    return batch


def blank_encoding(variant: Variant, transformer: Any, sizes: StepSizes) -> dict[str, Tensor]:
    """What the encoders make of a sample of these sizes, without its values; inputs and outputs as of `collate`."""
    target, *edited = (blank_latents(16, 8, image) for image in sizes.images)
    text = torch.empty(sizes.text_tokens, transformer.config.joint_attention_dim, dtype=transformer.dtype)
    followed = {CONTROL_LATENTS: target} if variant.step_components else {}
    shown = {EDIT_LATENTS.format(number): latents for number, latents in enumerate(edited)}
    return {"latents": target, "prompt_embeds": text, **followed, **shown}


def edit_latents(batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the latents of the reference images in order, each `[B, 16, 1, h, w]`."""
    return numbered(batch, EDIT_LATENTS)


def predict_velocity(
    transformer: Any, noisy: Tensor, sigma: Tensor, batch: Mapping[str, Tensor], controlnet: Any = None
) -> Tensor:
    """Call the transformer as diffusers' pipelines do: packed latents, timestep = sigma, text mask if needed.

    The tokens of reference images follow those of the target; their part of the output is dropped.

    Args:
        noisy: `[B, 16, 1, h, w]` float32.
        sigma: `[B]` float32; the transformer itself rounds it to its compute dtype.
        controlnet: called unless the batch has its outputs.

    Returns:
        `[B, 16, 1, h, w]`.
    """
    given, added = _inputs(noisy, sigma, batch), batch.get(CONTROL_OUTPUTS)
    if added is None and controlnet is not None:
        added = _call_controlnet(controlnet, given, batch)
    (prediction,) = transformer(controlnet_block_samples=added, **_states_as(given, transformer))
    *_, height, width = noisy.shape
    return unpack(prediction[:, : height // 2 * (width // 2)], height, width)


def control_outputs(controlnet: Any, noisy: Tensor, sigma: Tensor, batch: Mapping[str, Tensor]) -> Any:
    """Return what a ControlNet adds to the blocks of the transformer; inputs as of `predict_velocity`."""
    return _call_controlnet(controlnet, _inputs(noisy, sigma, batch), batch)


def _call_controlnet(controlnet: Any, given: Mapping[str, Any], batch: Mapping[str, Tensor]) -> Any:
    """Call a ControlNet as in `QwenImageControlNetPipeline`, at scale 1."""
    inputs = {**given, "encoder_hidden_states": read_by_controlnet(batch, "prompt_embeds")}
    followed = pack(batch[CONTROL_LATENTS]).to(controlnet.dtype)
    return controlnet(controlnet_cond=followed, **_states_as(inputs, controlnet))


def _inputs(noisy: Tensor, sigma: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what transformer and ControlNet both take."""
    images = [noisy, *edit_latents(batch)]
    shapes = [(1, latents.shape[-2] // 2, latents.shape[-1] // 2) for latents in images]
    return {
        "hidden_states": torch.cat([pack(latents) for latents in images], dim=1),
        "timestep": sigma,
        "encoder_hidden_states": batch["prompt_embeds"],
        "encoder_hidden_states_mask": batch.get("prompt_mask"),
        "img_shapes": [shapes] * len(noisy),
        "return_dict": False,
    }


def rescale_tokens(velocity: Tensor, reference: Tensor) -> Tensor:
    """Return a velocity whose tokens have the norm of those of `reference`, both `[B, 16, 1, h, w]`.

    Source: the guidance of diffusers' `QwenImagePipeline`.
    """
    tokens = pack(velocity)
    norms = [torch.norm(one, dim=-1, keepdim=True) for one in (pack(reference), tokens)]
    return unpack(tokens * (norms[0] / norms[1]), *velocity.shape[-2:])


def _states_as(given: dict[str, Any], module: Any) -> dict[str, Any]:
    """Return inputs with the states among them in the dtype of the module that reads them."""
    states = ("hidden_states", "encoder_hidden_states")
    return {**given, **{name: given[name].to(module.dtype) for name in states}}

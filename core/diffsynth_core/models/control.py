"""ControlNets as in diffusers, for all families. No torch.

A ControlNet reads the inputs of the transformer and the latents of a control image; the outputs of its blocks are
added after the transformer's blocks.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from diffsynth_core.data.conditions import Condition
from diffsynth_core.models.spec import Variant

CONTROLNET = "controlnet"
"""Name of the component."""
CONTROLNET_IMAGE = "controlnet_image"
"""Extra input and metadata column of the control image."""
CONTROL_LATENTS = "controlnet_latents"
"""Name of its latents, and of their encoder."""
CONTROL_OUTPUTS = "control_outputs"
"""Name in a batch of what a ControlNet adds to the transformer, where it is computed once for several prompts."""
OF_CONTROLNET = "{}_of_controlnet"
"""Name of an encoding that a ControlNet reads instead of the one that the transformer reads."""
FILE_PATTERNS = ("controlnet/*", "*[Cc]ontrol[Nn]et*:diffusion_pytorch_model*")
"""Paths of ControlNets in repositories: a folder, or a repository with ControlNet in its name."""

CONTROL_IMAGE = Condition(CONTROLNET_IMAGE, CONTROLNET_IMAGE, size="target", max_count=1)
"""The control image."""


def with_controlnet(variant: Variant, extra_unused: Callable[[frozenset[str]], frozenset[str]]) -> Variant:
    """Return a variant with a ControlNet, whose only condition is the control image.

    Args:
        extra_unused: keys of the ControlNet -> those of modules or tensors that its training does not use.
    """
    # The control image is encoded as the target is, by the same VAE.
    of_target = next(encoder for encoder in variant.encoders if encoder.columns == (variant.target.column,))
    return replace(
        variant,
        title=f"{variant.title} with a ControlNet",
        components=(*variant.components, CONTROLNET),
        encoders=(*variant.encoders, replace(of_target, name=CONTROL_LATENTS, columns=(CONTROLNET_IMAGE,))),
        conditions=(CONTROL_IMAGE,),
        accepted_inputs=(CONTROLNET_IMAGE,),
        step_components=(CONTROLNET,),
        extra_unused={CONTROLNET: extra_unused},
    )


def with_negative_prompt(positive: Mapping[str, Any], negative: Mapping[str, Any]) -> dict[str, Any]:
    """Return the encodings of a sample with the negative prompt, of which a ControlNet still reads the prompt.

    So the transformer reads the same outputs of the ControlNet with both prompts, as in `QwenImageControlNetPipeline`
    and `FluxControlNetPipeline`.
    """
    kept = {OF_CONTROLNET.format(name): positive[name] for name in negative} if CONTROL_LATENTS in positive else {}
    return {**positive, **negative, **kept}


def read_by_controlnet(batch: Mapping[str, Any], name: str) -> Any:
    """Return the encoding of a name that the ControlNet reads."""
    return batch.get(OF_CONTROLNET.format(name), batch[name])


def count_added(outputs: int, blocks: int) -> int:
    """Return how many of a ControlNet's `outputs` a transformer with `blocks` blocks adds: the first ones.

    Each is added after ceil(blocks / outputs) consecutive blocks, so that the last ones may be unused. Source:
    `forward` of diffusers' `QwenImageTransformer2DModel` and `FluxTransformer2DModel`.
    """
    if not outputs or not blocks:
        return 0
    each = -(-blocks // outputs)
    return -(-blocks // each)

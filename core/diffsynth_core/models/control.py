"""ControlNets as diffusers has them, whatever the family. No torch.

A ControlNet reads what the transformer reads and, beside it, the latents of an image to follow; what its blocks make
of them is added behind the transformer's blocks.
"""

from collections.abc import Callable
from dataclasses import replace

from diffsynth_core.models.size_facts import LatentFacts
from diffsynth_core.models.spec import EncoderFacts, References, Variant

CONTROLNET = "controlnet"
"""Name of the component."""
CONTROLNET_IMAGE = "controlnet_image"
"""The extra input and metadata column of the image to follow."""
CONTROL_LATENTS = "controlnet_latents"
"""Name of its latents, and of the encoder that makes them."""
FILE_PATTERNS = ("controlnet/*", "*[Cc]ontrol[Nn]et*:diffusion_pytorch_model*")
"""Where repositories keep a ControlNet: in a folder, or in one of its own that says so in its name."""

IMAGE = References(CONTROLNET_IMAGE, CONTROLNET_IMAGE, size=None, most=1)
LATENTS = EncoderFacts(
    name=CONTROL_LATENTS, component="vae", columns=(CONTROLNET_IMAGE,), latents=LatentFacts(channels=16, factor=8)
)


def with_controlnet(variant: Variant, extra_unused: Callable[[frozenset[str]], frozenset[str]]) -> Variant:
    """A kind of model with a ControlNet beside it, which is shown the image to follow and nothing else.

    `extra_unused`: names of modules or tensors of the ControlNet -> those that its training does not reach.
    """
    return replace(
        variant,
        title=f"{variant.title} with a ControlNet",
        components=(*variant.components, CONTROLNET),
        encoders=(*variant.encoders, LATENTS),
        references=(IMAGE,),
        conditions=(CONTROLNET_IMAGE,),
        step_components=(CONTROLNET,),
        extra_unused={CONTROLNET: extra_unused},
    )


def count_added(outputs: int, blocks: int) -> int:
    """How many of a ControlNet's `outputs` a transformer of `blocks` blocks adds: the first of them.

    Each is added behind as many blocks in a row, blocks / outputs rounded up, so that the last may be left over.
    Source: `forward` of diffusers' `QwenImageTransformer2DModel` and `FluxTransformer2DModel`.
    """
    if not outputs or not blocks:
        return 0
    each = -(-blocks // outputs)
    return -(-blocks // each)

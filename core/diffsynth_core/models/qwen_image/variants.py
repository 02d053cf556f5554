"""Variants of Qwen-Image: text to image, ControlNet, and editing with one or several reference images. No torch."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from diffsynth_core.data.conditions import Condition, TargetSpec
from diffsynth_core.models.control import CONTROLNET_IMAGE, with_controlnet
from diffsynth_core.models.qwen_image import sampling
from diffsynth_core.models.qwen_image.captions import EDIT_PLUS_TEXT, EDIT_TEXT, TEXT
from diffsynth_core.models.qwen_image.keys import dead_in_controlnet
from diffsynth_core.models.shapes import count_blocks
from diffsynth_core.models.size_facts import LatentFacts
from diffsynth_core.models.spec import EncoderFacts, Shapes, Variant

EDIT_IMAGE = "edit_image"
"""Extra input and metadata column of reference images, and name of their latents' input."""
EDIT_IMAGE_SMALL = "edit_image_small"
"""The same images at the size at which the text encoder of the later models reads them."""

COMPONENTS = ("dit", "text_encoder", "vae")
"""Components of all variants."""
IMAGE = TargetSpec("image", "image", size_factor=16)
"""The target."""
OF_VAE = LatentFacts(channels=16, factor=8)
"""Size of the VAE's latents."""
LATENTS = EncoderFacts(name="latents", component="vae", columns=("image",), latents=OF_VAE)
"""Encoder of the target."""
EDIT_LATENTS = EncoderFacts(name="edit_latents", component="vae", columns=(EDIT_IMAGE,), latents=OF_VAE)
"""Encoder of reference images."""

TEXT_TO_IMAGE = Variant(
    title="Qwen-Image",
    model_id="Qwen/Qwen-Image",
    components=COMPONENTS,
    encoders=(EncoderFacts(name="text", component="text_encoder", columns=("prompt",), caption=TEXT), LATENTS),
    target=IMAGE,
    sampling=sampling.TEXT_TO_IMAGE,
    accepted_inputs=(EDIT_IMAGE, CONTROLNET_IMAGE),
)
"""The text-to-image variant."""

VAE_AREA = 1024 * 1024
"""Area in pixels to which diffusers' editing pipelines resize images for the VAE (`VAE_IMAGE_SIZE`)."""
PROMPT_AREA = 384 * 384
"""The same for the text encoder (`CONDITION_IMAGE_SIZE`)."""
SIDE_STEP = 32
"""Divisor of the sides of resized images."""
MAX_ASPECT_RATIO = 200
"""Maximum aspect ratio that the image processor of Qwen2.5-VL accepts."""


@dataclass(frozen=True)
class EditModel:
    """A published editing model.

    Attributes:
        one_image: the first model: one reference image, which its text encoder reads at the size for the VAE. In later
            models images are numbered, and the text encoder reads smaller ones.
        guessed: the name of the files does not determine the model.
    """

    model_id: str
    one_image: bool = False
    guessed: bool = False

    @property
    def title(self) -> str:
        """Name for messages."""
        name = self.model_id.rpartition("/")[2]
        return f"Qwen-Image, shown images as {name} (the name of its files tells no kind)" if self.guessed else name


EDIT_MODELS = (
    (r"-2511(?!\d)", EditModel("Qwen/Qwen-Image-Edit-2511")),
    (r"-2509(?!\d)", EditModel("Qwen/Qwen-Image-Edit-2509")),
    (r"FireRed-Image-Edit-1\.1", EditModel("FireRedTeam/FireRed-Image-Edit-1.1")),
    (r"FireRed-Image-Edit", EditModel("FireRedTeam/FireRed-Image-Edit-1.0")),
    (r"(^|[/\\,\s]|--)Qwen-Image-Edit([/\\:,\s]|$)", EditModel("Qwen/Qwen-Image-Edit", one_image=True)),
    (r"", EditModel("Qwen/Qwen-Image-Edit-2509", guessed=True)),
)
"""(pattern in the name of the denoiser's files, model), first match wins."""


def edit_model(origin: str) -> EditModel:
    """Return the editing model by the name of the denoiser's files: all have the same shapes."""
    return next(model for pattern, model in EDIT_MODELS if re.search(pattern, origin))


def vae_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Return the (height, width) at which the VAE reads a reference image; see `edit_size`."""
    return edit_size(width / height, VAE_AREA * min(1, max_pixels / VAE_AREA))


def prompt_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Return the (height, width) at which the text encoder of the later models reads a reference image.

    A smaller `max_pixels` reduces it in proportion to the size for the VAE.
    """
    return edit_size(width / height, PROMPT_AREA * min(1, max_pixels / VAE_AREA))


def edit_size(ratio: float, area: float) -> tuple[int, int]:
    """Return (height, width), multiples of 32, with an area near `area`; (0, 0) if the aspect ratio is too large.

    As `calculate_dimensions` of diffusers' editing pipelines, except that no side is rounded to 0 for small areas.
    """
    width = math.sqrt(area * ratio)
    sides = [max(SIDE_STEP, round(side / SIDE_STEP) * SIDE_STEP) for side in (width / ratio, width)]
    return (0, 0) if max(sides) > MAX_ASPECT_RATIO * min(sides) else (sides[0], sides[1])


EDIT = Condition(EDIT_IMAGE, EDIT_IMAGE, vae_size)
EDIT_SMALL = Condition(EDIT_IMAGE_SMALL, EDIT_IMAGE, prompt_size)


def variant(shapes: Mapping[str, Shapes], inputs: tuple[str, ...], origin: str) -> Variant:
    """Return the variant: with a ControlNet or for editing if the extra inputs say so, otherwise text to image.

    The shapes of editing models are those of the text-to-image model.
    """
    plain = replace(TEXT_TO_IMAGE, sampling=sampling.text_to_image(origin))
    if CONTROLNET_IMAGE in inputs:
        blocks = count_blocks(shapes["dit"], "transformer_blocks.") if "dit" in shapes else None
        return with_controlnet(plain, partial(dead_in_controlnet, blocks=blocks))
    return edit_variant(edit_model(origin)) if EDIT_IMAGE in inputs else plain


def edit_variant(model: EditModel) -> Variant:
    """Return the variant of an editing model, which uses the vision tower of its text encoder."""
    name, read, facts = (
        ("edit_text", EDIT_IMAGE, EDIT_TEXT)
        if model.one_image
        else ("edit_plus_text", EDIT_IMAGE_SMALL, EDIT_PLUS_TEXT)
    )
    text = EncoderFacts(name=name, component="text_encoder", columns=("prompt", read), caption=facts, reads_values=True)
    return Variant(
        title=model.title,
        model_id=model.model_id,
        components=COMPONENTS,
        encoders=(text, LATENTS, EDIT_LATENTS),
        target=IMAGE,
        sampling=sampling.EDIT if model.one_image else sampling.EDIT_PLUS,
        conditions=(replace(EDIT, max_count=1),) if model.one_image else (EDIT, EDIT_SMALL),
        extra_trainable={"text_encoder": frozenset({"model.visual"})},
        accepted_inputs=(EDIT_IMAGE,),
    )

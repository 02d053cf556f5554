"""What Qwen-Image's models are trained for: images from text, and the editing of one image or several. No torch."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from diffsynth_core.models.control import CONTROLNET_IMAGE, with_controlnet
from diffsynth_core.models.qwen_image.captions import EDIT_PLUS_TEXT, EDIT_TEXT, TEXT
from diffsynth_core.models.qwen_image.keys import dead_in_controlnet
from diffsynth_core.models.shapes import count_blocks
from diffsynth_core.models.size_facts import LatentFacts
from diffsynth_core.models.spec import EncoderFacts, References, Shapes, TargetSpec, Variant

EDIT_IMAGE = "edit_image"
"""The extra input and metadata column of the images to edit, and what the VAE's encoder calls them."""
EDIT_IMAGE_SMALL = "edit_image_small"
"""The same images at the size at which the text encoder of the later models looks at them."""

COMPONENTS = ("dit", "text_encoder", "vae")
IMAGE = TargetSpec("image", "image", size_factor=16)
OF_VAE = LatentFacts(channels=16, factor=8)
LATENTS = EncoderFacts(name="latents", component="vae", columns=("image",), latents=OF_VAE)
EDIT_LATENTS = EncoderFacts(name="edit_latents", component="vae", columns=(EDIT_IMAGE,), latents=OF_VAE)

TEXT_TO_IMAGE = Variant(
    title="Qwen-Image",
    model_id="Qwen/Qwen-Image",
    components=COMPONENTS,
    encoders=(EncoderFacts(name="text", component="text_encoder", columns=("prompt",), caption=TEXT), LATENTS),
    target=IMAGE,
    conditions=(EDIT_IMAGE, CONTROLNET_IMAGE),
)

VAE_AREA = 1024 * 1024
PROMPT_AREA = 384 * 384
"""Areas, in pixels, to which diffusers' editing pipelines bring images for the VAE and for the text encoder
(`VAE_IMAGE_SIZE` and `CONDITION_IMAGE_SIZE`)."""
SIDE_STEP = 32
LARGEST_RATIO = 200
"""Longer side by shorter side that the image processor of Qwen2.5-VL takes at most."""


@dataclass(frozen=True)
class EditModel:
    """A published editing model. The first edits `one_image`, which its text encoder sees as large as the VAE does;
    in the later ones images are numbered, and the text encoder sees them smaller. `guessed`: nothing tells that it is
    this one."""

    model_id: str
    one_image: bool = False
    guessed: bool = False

    @property
    def title(self) -> str:
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
"""(what is found in the name of the denoiser's files, the model that they are taken for), first match wins."""


def edit_model(origin: str) -> EditModel:
    """The editing model that what the user wrote for the denoiser's files tells of: all have the same shapes."""
    return next(model for pattern, model in EDIT_MODELS if re.search(pattern, origin))


def vae_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) at which the VAE reads an image to edit; see `edit_size`."""
    return edit_size(width / height, VAE_AREA * min(1, max_pixels / VAE_AREA))


def prompt_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) at which the text encoder of the later models reads it, smaller as the VAE's size is."""
    return edit_size(width / height, PROMPT_AREA * min(1, max_pixels / VAE_AREA))


def edit_size(ratio: float, area: float) -> tuple[int, int]:
    """(height, width), multiples of 32, of about `area` pixels; (0, 0) where the ratio of sides is out of bounds.

    As `calculate_dimensions` of diffusers' editing pipelines, but no side is rounded to 0, as small areas are.
    """
    width = math.sqrt(area * ratio)
    sides = [max(SIDE_STEP, round(side / SIDE_STEP) * SIDE_STEP) for side in (width / ratio, width)]
    return (0, 0) if max(sides) > LARGEST_RATIO * min(sides) else (sides[0], sides[1])


def variant(shapes: Mapping[str, Shapes], inputs: tuple[str, ...], origin: str) -> Variant:
    """Text to image, or editing when images to edit are asked for; which model edits shows in no shape.

    With an image to follow, text to image beside a ControlNet.
    """
    if CONTROLNET_IMAGE in inputs:
        blocks = count_blocks(shapes["dit"], "transformer_blocks.") if "dit" in shapes else None
        return with_controlnet(TEXT_TO_IMAGE, partial(dead_in_controlnet, blocks=blocks))
    return edit_variant(edit_model(origin)) if EDIT_IMAGE in inputs else TEXT_TO_IMAGE


def edit_variant(model: EditModel) -> Variant:
    """What an editing model required_conditions: the image half of its text encoder is in use."""
    shown = References(EDIT_IMAGE, EDIT_IMAGE, vae_size, most=1 if model.one_image else None)
    small = References(EDIT_IMAGE_SMALL, EDIT_IMAGE, prompt_size)
    name, read, facts = (
        ("edit_text", EDIT_IMAGE, EDIT_TEXT)
        if model.one_image
        else ("edit_plus_text", EDIT_IMAGE_SMALL, EDIT_PLUS_TEXT)
    )
    text = EncoderFacts(name=name, component="text_encoder", columns=("prompt", read), caption=facts)
    return Variant(
        title=model.title,
        model_id=model.model_id,
        components=COMPONENTS,
        encoders=(text, LATENTS, EDIT_LATENTS),
        target=IMAGE,
        references=(shown,) if model.one_image else (shown, small),
        extra_trainable={"text_encoder": frozenset({"model.visual"})},
        conditions=(EDIT_IMAGE,),
    )

"""Declaration of FLUX.2 klein. No torch."""

import math
from collections.abc import Mapping
from dataclasses import replace

from diffsynth_core.data.conditions import Condition, TargetSpec
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.flux2 import captions, keys, sampling
from diffsynth_core.models.flux2.sizes import PUBLISHED
from diffsynth_core.models.flux2.work import WORK
from diffsynth_core.models.shapes import count_blocks
from diffsynth_core.models.size_facts import LatentFacts
from diffsynth_core.models.spec import (
    ComponentFacts,
    EncoderFacts,
    FamilyFacts,
    Layout,
    ShapeConstraint,
    Shapes,
    TokenizerFacts,
    UnsupportedCheckpoint,
    Variant,
)

SIZE_FACTOR = 16
"""Pixels per token, along a side: 8 of the VAE, times 2 of the latents' patches."""
REFERENCE_AREA = 1024 * 1024
"""Maximum area of reference images, to which larger ones are scaled down (`Flux2KleinPipeline`)."""
LEAST_SIDE = 64
LARGEST_RATIO = 8
"""Bounds of reference images: shorter side in pixels, longer side by shorter one (`Flux2ImageProcessor`)."""
DEV_TEXT_WIDTH = 15360
"""Width of FLUX.2-dev's text states."""
GUIDANCE = "time_guidance_embed.guidance_embedder.linear_1.weight"
LARGE_SINGLE_BLOCKS = 24
"""Single blocks of klein 9B; 4B has 20."""


def reference_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Return the (height, width) of a reference image of `width` x `height`, as in `Flux2KleinPipeline`.

    Larger ones are scaled down to the maximum area, smaller ones are not scaled up; sides are cropped to multiples of
    16. (0, 0) for images that the pipeline rejects.
    """
    if min(width, height) < LEAST_SIDE or max(width, height) > LARGEST_RATIO * min(width, height):
        return 0, 0
    area = min(REFERENCE_AREA, max_pixels)
    if width * height > area:
        scale = math.sqrt(area / (width * height))
        width, height = int(width * scale), int(height * scale)
    return height, width


TEXT = EncoderFacts(name="text", component="text_encoder", columns=("prompt",), reads_values=True)
"""Its padded tokens are masked, which a measurement without values cannot tell."""
OF_VAE = LatentFacts(channels=128, factor=16)
LATENTS = EncoderFacts(name="latents", component="vae", columns=("image",), latents=OF_VAE)
EDIT = EncoderFacts(name="edit_image", component="vae", columns=("edit_image",), latents=OF_VAE)
EDIT_IMAGES = Condition("edit_image", "edit_image", reference_size, factor=SIZE_FACTOR)


def variant(shapes: Mapping[str, Shapes], inputs: tuple[str, ...], origin: str) -> Variant:
    """Return the variant of klein: text to image, or editing if reference images are requested.

    Raises:
        DiffSynthError: for FLUX.2-dev, recognized by its guidance embedder and the width of its text states.
    """
    transformer = shapes.get("dit", {})
    text_width = transformer.get("context_embedder.weight", (0, 0))[1]
    if GUIDANCE in transformer or text_width == DEV_TEXT_WIDTH:
        raise DiffSynthError(
            f"`{origin}` is the FLUX.2-dev transformer, which is not supported yet",
            "use a FLUX.2 klein transformer, such as `black-forest-labs/FLUX.2-klein-4B:transformer/*.safetensors`",
        )
    blocks = count_blocks(transformer, "single_transformer_blocks.") if transformer else None
    size = "9B" if (blocks >= LARGE_SINGLE_BLOCKS if blocks is not None else "9b" in origin.lower()) else "4B"
    shown = EDIT_IMAGES.column in inputs
    return Variant(
        title="FLUX.2 klein",
        model_id=f"black-forest-labs/FLUX.2-klein-{size}",
        components=("dit", "text_encoder", "vae"),
        encoders=(replace(TEXT, caption=captions.TEXT[size]), LATENTS, *((EDIT,) if shown else ())),
        target=TargetSpec("image", "image", size_factor=SIZE_FACTOR),
        sampling=sampling.sampling(origin),
        conditions=(EDIT_IMAGES,) if shown else (),
        accepted_inputs=(EDIT_IMAGES.column,),
    )


FLUX2 = FamilyFacts(
    name="flux2",
    implementation="diffsynth_core.models.flux2.family:Flux2",
    title="FLUX.2",
    model_ids=("black-forest-labs/FLUX.2-*",),
    components=(
        ComponentFacts(
            name="dit",
            title="diffusion transformer",
            work=WORK,
            layouts=(
                Layout(keys.TRANSFORMER_SIGNATURE),
                Layout(keys.TRANSFORMER_ORIGINAL_SIGNATURE, keys.DIT_ORIGINAL),
            ),
            file_patterns=("transformer/*", "flux-2-*", "flux2-*"),
            config_classes=("Flux2Transformer2DModel",),
            lora_targets=keys.LORA_TARGETS,
            modules=keys.DIT_MODULES,
            sides=keys.DIT_SIDES,
            blocks={"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"},
            max_blocks=keys.DIT_BLOCKS,
            lora_fused={"comfyui": keys.DIT_ORIGINAL, "kohya": keys.DIT_ORIGINAL},
            published={"original": keys.DIT_ORIGINAL},
            comfyui="original",
            folder="transformer",
        ),
        ComponentFacts(
            name="text_encoder",
            title="Qwen3 text encoder",
            layouts=(Layout(keys.TEXT_ENCODER_SIGNATURE),),
            file_patterns=("text_encoder/*",),
            unused_params=keys.unused_in_text_encoder,
            comfyui="original",
        ),
        ComponentFacts(
            name="vae",
            title="VAE",
            layouts=(Layout(keys.VAE_SIGNATURE),),
            file_patterns=("vae/*",),
            config_classes=("AutoencoderKLFlux2",),
            published={"original": None},
            unused_params=keys.unused_in_vae,
        ),
    ),
    architectures={"*-4B": "Flux.2-klein-4b", "*-9B": "Flux.2-klein-9b"},
    repository="https://github.com/black-forest-labs/flux2",
    denoiser="dit",
    variant=variant,
    text_column="prompt",
    conditions=(EDIT_IMAGES,),
    published=PUBLISHED,
    tokenizers={
        "tokenizer_path": TokenizerFacts(
            "text_encoder",
            ("../tokenizer",),
            "black-forest-labs/FLUX.2-klein-4B:tokenizer",
            files=(*TokenizerFacts.files, "chat_template.jinja"),
            model="BPE",
            embedding="model.embed_tokens.weight",
        )
    },
    shape_constraints=(
        ShapeConstraint(
            "text_encoder",
            ("model.embed_tokens.weight", 1),
            ("context_embedder.weight", 1),
            "text states",
            parts=len(keys.TEXT_LAYERS),
        ),
        ShapeConstraint("vae", ("bn.running_mean", 0), ("x_embedder.weight", 1), "latents"),
    ),
    not_trained={"black-forest-labs/FLUX.2-dev:t*": "FLUX.2-dev"},
    lookalikes=(
        UnsupportedCheckpoint(
            "the Mistral text encoder of FLUX.2-dev", "text_encoder", keys.DEV_TEXT_ENCODER_SIGNATURE
        ),
        UnsupportedCheckpoint(
            "a Mistral text encoder such as that of FLUX.2-dev", "text_encoder", keys.DEV_TEXT_ENCODER_MODULE_SIGNATURE
        ),
    ),
)

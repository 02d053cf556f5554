"""Declaration of FLUX.1. No torch."""

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from functools import partial

from diffsynth_core.data.conditions import Condition, TargetSpec
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.control import CONTROL_IMAGE, CONTROLNET, CONTROLNET_IMAGE, FILE_PATTERNS, with_controlnet
from diffsynth_core.models.flux import keys, sampling
from diffsynth_core.models.flux.captions import POOLED, TEXT
from diffsynth_core.models.flux.sizes import PUBLISHED
from diffsynth_core.models.flux.work import WORK
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

KINDS = (
    ("*kontext*", "FLUX.1 Kontext", "black-forest-labs/FLUX.1-Kontext-dev", sampling.KONTEXT),
    ("*krea*", "FLUX.1 Krea", "black-forest-labs/FLUX.1-Krea-dev", sampling.KREA),
    ("*", "FLUX.1", "black-forest-labs/FLUX.1-dev", sampling.DEV),
)
"""(pattern in what the user wrote for the transformer's files, title, repository, defaults for generating); all have
the same shapes."""

PATCH = 4
"""Latent values per token: patches of 2 x 2."""
SIZE_FACTOR = 16
"""Pixels per token, along a side."""
KONTEXT_IMAGES = "kontext_images"
KONTEXT_SIZES = (
    *((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104)),
    (1024, 1024),
    *((1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672)),
)
"""(width, height) that Kontext was trained with.

Source: `PREFERRED_KONTEXT_RESOLUTIONS` of diffusers' `FluxKontextPipeline`.
"""
KONTEXT_AREA = 1024 * 1024

OF_VAE = LatentFacts(channels=16, factor=8)
ENCODERS = (
    EncoderFacts(name="text_1", component="text_encoder_1", columns=("prompt",), states=POOLED),
    EncoderFacts(name="text_2", component="text_encoder_2", columns=("prompt",), caption=TEXT),
    EncoderFacts(name="latents", component="vae", columns=("image",), latents=OF_VAE),
)
KONTEXT_LATENTS = EncoderFacts(name="kontext_latents", component="vae", columns=(KONTEXT_IMAGES,), latents=OF_VAE)


def kontext_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Return the (height, width) at which a reference image is read: the size of Kontext's training closest in aspect
    ratio.

    `max_pixels` below 1024 x 1024 reduces it in proportion; a side is 0 if nothing is left.
    """
    _, best_width, best_height = min((abs(width / height - w / h), w, h) for w, h in KONTEXT_SIZES)
    scale = math.sqrt(min(1.0, max_pixels / KONTEXT_AREA))
    return (
        int(best_height * scale) // SIZE_FACTOR * SIZE_FACTOR,
        int(best_width * scale) // SIZE_FACTOR * SIZE_FACTOR,
    )


KONTEXT = Condition(KONTEXT_IMAGES, KONTEXT_IMAGES, kontext_size)


def variant(shapes: Mapping[str, Shapes], inputs: tuple[str, ...], origin: str) -> Variant:
    """Return the variant: FLUX.1-dev, Krea or Kontext. All accept reference images or a control image; none requires
    them.

    Raises:
        DiffSynthError: for a transformer without guidance, or with additional input channels.
    """
    guidance = "time_text_embed.guidance_embedder.linear_1.weight"
    transformer = shapes.get("dit", {})
    if transformer and guidance not in transformer:
        raise DiffSynthError(
            "the transformer has no guidance embedder: few-step distilled models such as FLUX.1-schnell are not supported",
            "use the transformer of FLUX.1-dev, FLUX.1-Krea-dev or FLUX.1-Kontext-dev",
        )
    taken = transformer.get("x_embedder.weight", (0, 16 * PATCH))[1]
    made = transformer.get("proj_out.weight", (16 * PATCH,))[0]
    if taken != made:
        raise DiffSynthError(
            f"the transformer has {taken} input and {made} output channels: this variant of FLUX.1 is not supported yet",
            "use the transformer of FLUX.1-dev, FLUX.1-Krea-dev or FLUX.1-Kontext-dev (64, 64)",
        )
    controlled = CONTROLNET_IMAGE in inputs
    shown = KONTEXT_IMAGES in inputs and not controlled
    _, title, model_id, defaults = next(kind for kind in KINDS if fnmatch(origin.lower(), kind[0]))
    plain = Variant(
        title=title,
        model_id=model_id,
        components=("dit", "text_encoder_1", "text_encoder_2", "vae"),
        encoders=(*ENCODERS, KONTEXT_LATENTS) if shown else ENCODERS,
        target=TargetSpec("image", "image", size_factor=SIZE_FACTOR),
        sampling=defaults,
        conditions=(KONTEXT,) if shown else (),
        accepted_inputs=(KONTEXT_IMAGES, CONTROLNET_IMAGE),
    )
    return with_controlnet(plain, _unreached_in_controlnet(transformer)) if controlled else plain


def _unreached_in_controlnet(shapes: Shapes) -> Callable[[frozenset[str]], frozenset[str]]:
    blocks, single_blocks = (
        count_blocks(shapes, f"{kind}transformer_blocks.") if shapes else None for kind in ("", "single_")
    )
    return partial(keys.dead_in_controlnet, blocks=blocks, single_blocks=single_blocks)


FLUX = FamilyFacts(
    name="flux",
    implementation="diffsynth_core.models.flux.family:Flux",
    title="FLUX.1",
    model_ids=("black-forest-labs/FLUX.1-*",),
    components=(
        ComponentFacts(
            name="dit",
            title="diffusion transformer",
            work=WORK,
            layouts=(
                Layout(keys.DIT_ORIGINAL_SIGNATURE, keys.DIT_ORIGINAL, keys.DIT, keys.DIT_ORIGINAL),
                Layout(keys.DIT_DIFFUSERS_SIGNATURE, public_keys=keys.DIT, saved_keys=keys.DIT_ORIGINAL),
                Layout(keys.DIT_DOCUMENTED_SIGNATURE, keys.DIT, keys.DIT, keys.DIT_ORIGINAL),
            ),
            file_patterns=("transformer/*", "flux1-*"),
            config_classes=("FluxTransformer2DModel",),
            lora_targets=keys.LORA_TARGETS,
            modules=keys.DIT_MODULES,
            sides=keys.DIT_SIDES,
            blocks={"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"},
            max_blocks=keys.DIT_BLOCKS,
            unread_formats=("diffsynth",),
            lora_key_maps={"diffusers": keys.DIT, "comfyui": keys.DIT_DOCUMENTED, "kohya": keys.DIT_DOCUMENTED},
            published={"original": keys.DIT_ORIGINAL},
            comfyui="original",
            folder="transformer",
        ),
        ComponentFacts(
            name="text_encoder_1",
            title="CLIP text encoder",
            layouts=(
                Layout(keys.CLIP_SIGNATURE, keys.CLIP, keys.CLIP),
                Layout(keys.CLIP_FLAT_SIGNATURE, public_keys=keys.CLIP),
            ),
            file_patterns=("text_encoder/*",),
            comfyui="original",
            folder="text_encoder",
        ),
        ComponentFacts(
            name="text_encoder_2",
            title="T5 text encoder",
            layouts=(Layout(keys.T5_SIGNATURE, keys.T5, keys.T5),),
            file_patterns=("text_encoder_2/*",),
            comfyui="original",
        ),
        ComponentFacts(
            name="vae",
            title="VAE",
            layouts=(
                Layout(keys.VAE_ORIGINAL_SIGNATURE, keys.VAE_ORIGINAL, keys.VAE_ORIGINAL),
                Layout(keys.VAE_DIFFUSERS_SIGNATURE, public_keys=keys.VAE_ORIGINAL),
            ),
            file_patterns=("vae/*", "ae.*"),
            config_classes=("AutoencoderKL",),
            unused_params=keys.unused_in_vae,
            parts={"vae_encoder": "vae.encoder", "vae_decoder": "vae.decoder"},
            comfyui="original",
        ),
        ComponentFacts(
            name=CONTROLNET,
            title="ControlNet",
            work=WORK,
            layouts=(Layout(keys.CONTROLNET_SIGNATURE),),
            file_patterns=FILE_PATTERNS,
            config_classes=("FluxControlNetModel",),
            blocks={
                "transformer_blocks": "num_layers",
                "controlnet_blocks": "num_layers",
                "single_transformer_blocks": "num_single_layers",
                "controlnet_single_blocks": "num_single_layers",
            },
            inputs=(CONTROLNET_IMAGE,),
        ),
    ),
    architectures={"*": "flux-1-dev"},
    repository="https://github.com/black-forest-labs/flux",
    denoiser="dit",
    variant=variant,
    text_column="prompt",
    conditions=(KONTEXT, CONTROL_IMAGE),
    later_inputs=(
        *("controlnet_inpaint_mask", "controlnet_processor_id", "flux_fill_image", "flux_fill_mask"),
        *("flux_redux_image", "ipadapter_images", "infinityou_id_image", "infinityou_guidance"),
        *("eligen_entity_prompts", "eligen_entity_masks", "step1x_reference_image", "nexus_gen_reference_image"),
        *("value_controller_inputs", "lora_encoder_inputs"),
    ),
    published=PUBLISHED,
    tokenizers={
        "tokenizer_1_path": TokenizerFacts(
            "text_encoder_1",
            ("../tokenizer",),
            "black-forest-labs/FLUX.1-dev:tokenizer",
            what="CLIP tokenizer",
            model="BPE",
            embedding="embeddings.token_embedding.weight",
        ),
        "tokenizer_2_path": TokenizerFacts(
            "text_encoder_2",
            ("../tokenizer_2",),
            "black-forest-labs/FLUX.1-dev:tokenizer_2",
            layouts=(("tokenizer.json",),),
            what="T5 tokenizer",
            model="Unigram",
            embedding="shared.weight",
        ),
    },
    shape_constraints=(
        ShapeConstraint(
            "text_encoder_1",
            ("final_layer_norm.weight", 0),
            ("time_text_embed.text_embedder.linear_1.weight", 1),
            "text states",
        ),
        ShapeConstraint("text_encoder_2", ("shared.weight", 1), ("context_embedder.weight", 1), "text states"),
        ShapeConstraint("vae", ("decoder.conv_in.weight", 1), ("proj_out.weight", 0), "latents", parts=PATCH),
        ShapeConstraint(CONTROLNET, ("controlnet_blocks.0.weight", 0), ("x_embedder.weight", 0), "states"),
        ShapeConstraint(
            CONTROLNET, ("context_embedder.weight", 1), ("context_embedder.weight", 1), "text states", verb="takes"
        ),
        ShapeConstraint(
            CONTROLNET,
            ("controlnet_x_embedder.weight", 1),
            ("x_embedder.weight", 1),
            "patches",
            verb="takes",
            way_out="use a ControlNet with only a control image, not one for inpainting",
        ),
    ),
    not_trained={
        "black-forest-labs/FLUX.1-Fill-*:flux1-*": "FLUX.1 Fill",
        "black-forest-labs/FLUX.1-Redux-*:*": "FLUX.1 Redux",
        "black-forest-labs/FLUX.1-schnell:flux1-*": "FLUX.1-schnell (few-step distilled)",
        "ostris/Flex.2-*:*": "FLEX.2",
        "DiffSynth-Studio/AttriCtrl-FLUX.1-*:*": "AttriCtrl",
        "DiffSynth-Studio/LoRA-Encoder-FLUX.1-*:*": "LoRA-Encoder",
        "DiffSynth-Studio/Nexus-Gen*:*": "Nexus-Gen",
        "stepfun-ai/Step1X-Edit:step1x-*": "Step1X-Edit",
        "InstantX/FLUX.1-dev-IP-Adapter:*": "the FLUX.1 IP-Adapter",
        "ByteDance/InfiniteYou:*": "InfiniteYou",
    },
    lookalikes=(
        UnsupportedCheckpoint(
            "a union ControlNet, which is not supported yet",
            CONTROLNET,
            keys.UNION_TENSORS,
        ),
        UnsupportedCheckpoint(
            "a ControlNet with pixel inputs, which is not supported yet", CONTROLNET, keys.HINT_TENSORS
        ),
        UnsupportedCheckpoint(
            "a Qwen-Image ControlNet",
            CONTROLNET,
            frozenset({"controlnet_x_embedder.weight", "transformer_blocks.0.img_mod.1.weight"}),
        ),
        UnsupportedCheckpoint("the UMT5 text encoder of Wan", "text_encoder_2", keys.UMT5_TENSORS),
        UnsupportedCheckpoint("the VAE of FLUX.2", "vae", keys.FLUX_2_VAE_TENSORS),
    ),
)

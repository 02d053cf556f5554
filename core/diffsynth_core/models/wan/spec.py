"""Declaration of Wan. No torch."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from diffsynth_core.data.conditions import TargetSpec
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.configs import read_config
from diffsynth_core.models.size_facts import EmbeddingSpec, LatentFacts
from diffsynth_core.models.spec import (
    ComponentFacts,
    ComponentFiles,
    EncoderFacts,
    FamilyFacts,
    Layout,
    ShapeConstraint,
    Shapes,
    TokenizerFacts,
    UnsupportedCheckpoint,
    Variant,
)
from diffsynth_core.models.wan import captions, keys, sampling
from diffsynth_core.models.wan.sizes import (
    EMBEDDER,
    FP32_MODULES,
    FRAMES,
    FRAMES_PER_LATENT,
    IMAGE_TOKENS,
    PUBLISHED,
    head_size,
)
from diffsynth_core.models.wan.work import WORK

CONVERTED = "DiffSynth-Studio/Wan-Series-Converted-Safetensors"
"""Repository with safetensors copies of the pickled files in Wan's own repositories."""

PICKLED_FILES = (
    "models_t5_umt5-xxl-enc-bf16.pth",
    "Wan2.1_VAE.pth",
    "Wan2.2_VAE.pth",
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
)

TEXT = EncoderFacts(name="text", component="text_encoder", columns=("prompt",), caption=captions.TEXT)
OF_VAE = LatentFacts(channels=16, factor=8)
LATENTS = EncoderFacts(name="latents", component="vae", columns=("video",), latents=OF_VAE)
MASK_CHANNELS = FRAMES_PER_LATENT
"""Channels of the mask with the conditioning latents: one per frame of a latent frame."""
CLIPS = TargetSpec("video", "video", size_factor=16, frame_step=FRAMES_PER_LATENT, usual_pixels=832 * 480)
TI2V_NAME = "-TI2V-"
"""Part of the names of TI2V repositories."""
PATCH = 4
"""Latent values per token: patches of 1 x 2 x 2."""
FIRST_FRAME = ("input_image",)
TEXT_TO_VIDEO = Variant(
    title="Wan (text to video)",
    model_id="Wan-AI/Wan2.1-T2V-1.3B",
    components=("dit", "text_encoder", "vae"),
    encoders=(TEXT, LATENTS),
    target=CLIPS,
    sampling=sampling.T2V,
)


def variant(shapes: Mapping[str, Shapes], inputs: tuple[str, ...], origin: str) -> Variant:
    """Return the variant of a transformer by its input and output channels, and its image embedder.

    16 channels are latents only; 36 are latents, mask and conditioning latents; 48 are the latents of the VAE of Wan
    2.2. Without the transformer, the other components and the conditioning frames decide.

    Raises:
        DiffSynthError: for an unsupported variant, such as one with a control video.
    """
    if "dit" not in shapes:
        return _without_transformer(shapes, inputs, origin)
    transformer = shapes["dit"]
    taken = transformer.get("patch_embedding.weight", (0, 16))[1]
    made = transformer.get("proj_out.weight", (16 * PATCH,))[0] // PATCH
    if (taken, made) == (48, 48):
        return _text_and_image_to_video(inputs)
    if (taken, made) == (36, 16):
        return _image_to_video(
            inputs,
            origin,
            image_encoder=f"{EMBEDDER}.image_embedder.norm1.weight" in transformer,
            two_images=f"{EMBEDDER}.image_embedder.pos_embed" in transformer,
        )
    if (taken, made) != (16, 16):
        raise DiffSynthError(
            f"the transformer has {taken} input and {made} output channels: this variant of Wan is not supported yet",
            "use a transformer of text to video (16, 16), image to video (36, 16) or Wan 2.2 TI2V (48, 48)",
        )
    return _text_to_video(origin)


def _without_transformer(shapes: Mapping[str, Shapes], inputs: tuple[str, ...], origin: str) -> Variant:
    """Return the variant for these other components and conditioning frames.

    Wan 2.1 has an image encoder; of Wan 2.2 only TI2V has a VAE with 48 channels, or its name in the repository if
    there is no file.
    """
    if "image_encoder" in shapes:
        return _image_to_video(inputs, origin, image_encoder=True, two_images="end_image" in inputs)
    vae = shapes.get("vae", {})
    if vae.get("post_quant_conv.weight", (0,))[0] == 48 or (not vae and TI2V_NAME in origin):
        return _text_and_image_to_video(inputs)
    if "input_image" in inputs:
        return _image_to_video(inputs, origin, image_encoder=False, two_images=False)
    return _text_to_video(origin)


def _text_to_video(origin: str) -> Variant:
    return replace(TEXT_TO_VIDEO, sampling=sampling.text_to_video(origin))


def _image_to_video(inputs: tuple[str, ...], origin: str, image_encoder: bool, two_images: bool) -> Variant:
    """I2V: conditioning latents are additional channels; Wan 2.1 reads CLIP states of the frames too."""
    shown = tuple(name for name in FRAMES if name in inputs)
    channels = 2 * OF_VAE.channels + MASK_CHANNELS
    latents = EncoderFacts(
        name="latents_with_condition",
        component="vae",
        columns=("video",),
        inputs=shown,
        latents=LatentFacts(channels, OF_VAE.factor),
    )
    image = EncoderFacts(
        name="image",
        component="image_encoder",
        columns=("video",),
        reads_values=True,
        inputs=shown if two_images else (),
        first_frame_only=not two_images,
        states=EmbeddingSpec(
            IMAGE_TOKENS * (max(1, len(shown)) if two_images else 1),
            1280,
            (f"{EMBEDDER}.image_embedder.norm1.weight", 0),
        ),
    )
    return Variant(
        title="Wan (image to video)",
        model_id="Wan-AI/Wan2.1-I2V-14B-480P" if image_encoder else "Wan-AI/Wan2.2-I2V-A14B",
        components=("dit", "text_encoder", "vae", *(("image_encoder",) if image_encoder else ())),
        encoders=(TEXT, latents, *((image,) if image_encoder else ())),
        target=CLIPS,
        sampling=sampling.image_to_video(origin, image_encoder, two_images),
        accepted_inputs=tuple(FRAMES),
        required_inputs=tuple(FRAMES) if two_images else FIRST_FRAME,
    )


def _text_and_image_to_video(inputs: tuple[str, ...]) -> Variant:
    """TI2V: the first latent frame, if it is a condition, stays clean."""
    shown = "input_image" in inputs
    latents = LatentFacts(channels=48, factor=16)
    given = EncoderFacts(
        name="latents_with_first_given", component="vae", columns=("video",), inputs=FIRST_FRAME, latents=latents
    )
    return Variant(
        title="Wan 2.2 TI2V",
        model_id="Wan-AI/Wan2.2-TI2V-5B",
        components=("dit", "text_encoder", "vae"),
        encoders=(TEXT, given if shown else replace(LATENTS, latents=latents)),
        target=TargetSpec("video", "video", size_factor=32, frame_step=FRAMES_PER_LATENT),
        sampling=sampling.TI2V,
        accepted_inputs=FIRST_FRAME,
        num_conditioning_frames=1 if shown else 0,
    )


def heads(files: ComponentFiles, shapes: Shapes) -> int:
    """Return the attention heads of a transformer: those of its config.json, else those by its shapes."""
    config: Mapping[str, int] = {}
    if files.config_path:
        with suppress(DiffSynthError):  # its faults are reported when the component is built
            config = read_config(files.config_path, shapes)
    width = shapes["patch_embedding.weight"][0]
    return config.get("num_attention_heads") or config.get("num_heads") or width // head_size(width)


WAN = FamilyFacts(
    name="wan",
    implementation="diffsynth_core.models.wan.family:Wan",
    title="Wan",
    model_ids=("Wan-AI/Wan2.?-*", "PAI/Wan2.?-Fun-*InP"),
    components=(
        ComponentFacts(
            name="dit",
            title="diffusion transformer",
            work=WORK,
            heads=heads,
            layouts=(
                Layout(keys.DIT_ORIGINAL_SIGNATURE, keys.DIT, keys.DIT),
                Layout(keys.DIT_DIFFUSERS_SIGNATURE, public_keys=keys.DIT),
            ),
            file_patterns=(
                *("diffusion_pytorch_model*", "high_noise_model/*", "low_noise_model/*"),
                *("transformer/*", "transformer_2/*"),
            ),
            config_classes=("*WanModel", "WanTransformer3DModel"),
            lora_targets=keys.LORA_TARGETS,
            modules=keys.DIT_MODULES,
            blocks={"blocks": "num_layers"},
            fp32_modules=FP32_MODULES,
            lora_key_maps={"diffusers": keys.DIT},
            comfyui="original",
            folder="transformer",
        ),
        ComponentFacts(
            name="text_encoder",
            title="UMT5 text encoder",
            layouts=(
                Layout(keys.TEXT_ENCODER_ORIGINAL_SIGNATURE, keys.TEXT_ENCODER, keys.TEXT_ENCODER),
                Layout(keys.TEXT_ENCODER_DIFFUSERS_SIGNATURE, public_keys=keys.TEXT_ENCODER),
            ),
            file_patterns=("models_t5*", "text_encoder/*"),
        ),
        ComponentFacts(
            name="vae",
            title="VAE",
            layouts=(
                Layout(keys.VAE_2_1_ORIGINAL_SIGNATURE, keys.VAE_2_1, keys.VAE_2_1),
                Layout(keys.VAE_2_1_DIFFUSERS_SIGNATURE, public_keys=keys.VAE_2_1),
                Layout(keys.VAE_2_2_ORIGINAL_SIGNATURE, keys.VAE_2_2, keys.VAE_2_2),
                Layout(keys.VAE_2_2_DIFFUSERS_SIGNATURE, public_keys=keys.VAE_2_2),
            ),
            file_patterns=("Wan2.?_VAE*", "vae/*"),
            config_classes=("AutoencoderKLWan",),
            unused_params=keys.unused_in_vae,
            comfyui="original",
        ),
        ComponentFacts(
            name="image_encoder",
            title="CLIP image encoder",
            layouts=(
                Layout(keys.IMAGE_ENCODER_ORIGINAL_SIGNATURE, keys.IMAGE_ENCODER, keys.IMAGE_ENCODER),
                Layout(keys.IMAGE_ENCODER_DIFFUSERS_SIGNATURE, keys.IMAGE_ENCODER_DIFFUSERS, keys.IMAGE_ENCODER),
                Layout(keys.IMAGE_ENCODER_FLAT_SIGNATURE, public_keys=keys.IMAGE_ENCODER),
            ),
            file_patterns=("models_clip*", "image_encoder/*"),
            unused_params=keys.unused_in_image_encoder,
        ),
    ),
    architectures={"*": "wan2.1"},  # that of Wan 2.2 too
    repository="https://github.com/Wan-Video/Wan2.1",
    denoiser="dit",
    second_denoiser="dit2",
    variant=variant,
    text_column="prompt",
    frame_inputs=FRAMES,
    later_inputs=(
        *("control_video", "reference_image", "vace_video", "vace_video_mask", "vace_reference_image"),
        *("camera_control_direction", "camera_control_speed", "motion_bucket_id", "vap_video"),
        *("input_audio", "s2v_pose_video", "animate_pose_video", "animate_face_video"),
    ),
    published=PUBLISHED,
    tokenizers={
        "tokenizer_path": TokenizerFacts(
            "text_encoder",
            ("google/umt5-xxl", "../tokenizer"),
            "Wan-AI/Wan2.1-T2V-1.3B:google/umt5-xxl",
            layouts=(("tokenizer.json",),),
            model="Unigram",
            embedding="shared.weight",
        )
    },
    shape_constraints=(
        ShapeConstraint(
            "text_encoder", ("shared.weight", 1), (f"{EMBEDDER}.text_embedder.linear_1.weight", 1), "text states"
        ),
        ShapeConstraint("vae", ("post_quant_conv.weight", 0), ("proj_out.weight", 0), "latents", parts=PATCH),
        ShapeConstraint(
            "image_encoder", ("pre_layrnorm.weight", 0), (f"{EMBEDDER}.image_embedder.norm1.weight", 0), "states"
        ),
    ),
    not_trained={
        "*Wan*-Camera*:*diffusion_pytorch_model*": "Wan Fun Control-Camera (camera control)",
        "*Wan*-Fun-*Control*:*diffusion_pytorch_model*": "Wan Fun Control (control video)",
        "*VACE*:*diffusion_pytorch_model*": "Wan VACE",
        "Wan-AI/Wan*-S2V-*:*diffusion_pytorch_model*": "Wan S2V (speech to video)",
        "Wan-AI/Wan*-Animate-*:*": "Wan Animate",
        "Wan-AI/Wan-Dancer-*:*": "Wan Dancer",
        "ByteDance/Video-As-Prompt-Wan*:*diffusion_pytorch_model*": "Video-As-Prompt",
        "DiffSynth-Studio/Wan*-speedcontrol-*:*": "Wan with a motion controller",
        "meituan-longcat/LongCat-Video:*": "LongCat-Video",
        "krea/krea-realtime-video:*": "Krea Realtime",
    },
    lookalikes=(
        UnsupportedCheckpoint(
            "a Wan Fun Control-Camera transformer (camera control), which is not supported yet",
            "dit",
            frozenset({"control_adapter.conv.weight"}),
        ),
        UnsupportedCheckpoint(
            "a Wan Fun Control transformer with a reference image, which is not supported yet",
            "dit",
            frozenset({"ref_conv.weight", "head.modulation"}),
        ),
        UnsupportedCheckpoint(
            "a Wan VACE transformer, which is not supported yet", "dit", frozenset({"vace_patch_embedding.weight"})
        ),
    ),
    mirrors={name: f"{CONVERTED}:{name.removesuffix('.pth')}.safetensors" for name in PICKLED_FILES},
)

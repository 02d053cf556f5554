"""The documented defaults for generating, by what the user wrote for the denoiser's files."""

import pytest

from diffsynth_core.models.flux2.sampling import empirical_shift
from diffsynth_core.models.qwen_image.sampling import SCHEDULER
from diffsynth_core.models.registry import FAMILIES, load_family
from diffsynth_core.models.schedulers import token_shift

I2V = {"dit": {"patch_embedding.weight": (1, 36), "proj_out.weight": (64, 1)}}
EMBEDDER = "condition_embedder.image_embedder"
I2V_2_1 = {"dit": {**I2V["dit"], f"{EMBEDDER}.norm1.weight": (1280,)}}
FLF2V = {"dit": {**I2V_2_1["dit"], f"{EMBEDDER}.pos_embed": (1, 514, 1280)}}
TI2V = {"dit": {"patch_embedding.weight": (1, 48), "proj_out.weight": (192, 1)}}
FLUX_2 = "black-forest-labs/FLUX.2-klein-"


def sampling(family, origin="", shapes=None, inputs=()):
    return FAMILIES[family].variant(shapes or {}, inputs, origin).sampling


@pytest.mark.parametrize(
    ("family", "origin", "shapes", "inputs", "steps", "cfg_scale", "guidance"),
    [
        ("qwen-image", "Qwen/Qwen-Image:transformer/*", None, (), 50, 4.0, None),
        ("qwen-image", "Qwen/Qwen-Image", None, ("controlnet_image",), 50, 4.0, None),
        ("qwen-image", "Qwen/Qwen-Image-Edit", None, ("edit_image",), 50, 4.0, None),
        ("qwen-image", "Qwen/Qwen-Image-Edit-2511", None, ("edit_image",), 40, 4.0, None),
        ("flux", "black-forest-labs/FLUX.1-dev:flux1-dev.safetensors", None, (), 50, 1.0, 3.5),
        ("flux", "black-forest-labs/FLUX.1-Krea-dev", None, (), 28, 1.0, 4.5),
        ("flux", "black-forest-labs/FLUX.1-Kontext-dev", None, ("kontext_images",), 28, 1.0, 2.5),
        ("flux2", f"{FLUX_2}4B:transformer/*", None, (), 4, 1.0, None),
        ("flux2", f"{FLUX_2}base-9B:transformer/*", None, (), 50, 4.0, None),
    ],
)
def test_images(family, origin, shapes, inputs, steps, cfg_scale, guidance):
    found = sampling(family, origin, shapes, inputs)
    assert (found.steps, found.cfg_scale, found.guidance) == (steps, cfg_scale, guidance)
    assert found.num_frames == 1 and found.fps == 0 and found.boundary is None


def test_qwen_image_2512_has_a_negative_prompt_of_its_own():
    assert sampling("qwen-image", "Qwen/Qwen-Image-2512").negative_prompt.startswith("低分辨率")
    assert sampling("qwen-image", "Qwen/Qwen-Image").negative_prompt == " "


@pytest.mark.parametrize(
    ("origin", "shapes", "shift", "steps", "size", "boundary"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B:diffusion_pytorch_model*", {}, 3.0, 50, (480, 832), None),
        ("Wan-AI/Wan2.2-T2V-A14B:high_noise_model/*", {}, 12.0, 40, (720, 1280), 0.875),
        ("/models/low_noise_model/diffusion.safetensors", {}, 12.0, 40, (720, 1280), 0.875),
        ("Wan-AI/Wan2.1-I2V-14B-480P:*", I2V_2_1, 3.0, 40, (480, 832), None),
        ("Wan-AI/Wan2.1-I2V-14B-720P:*", I2V_2_1, 5.0, 40, (720, 1280), None),
        ("Wan-AI/Wan2.1-FLF2V-14B-720P:*", FLF2V, 16.0, 50, (720, 1280), None),
        ("Wan-AI/Wan2.2-I2V-A14B:high_noise_model/*", I2V, 5.0, 40, (480, 832), 0.9),
        ("Wan-AI/Wan2.2-TI2V-5B:*", TI2V, 5.0, 50, (704, 1280), None),
    ],
)
def test_clips(origin, shapes, shift, steps, size, boundary):
    found = sampling("wan", origin, shapes, ("input_image",) if "I2V" in origin else ())
    assert (found.shift, found.steps, (found.height, found.width), found.boundary) == (shift, steps, size, boundary)
    assert found.fps == (24 if shapes is TI2V else 16) and found.num_frames % 4 == 1
    assert found.negative_prompt.startswith("色调艳丽") and found.cfg_scale > 1


def test_the_documented_size_is_one_that_the_model_takes():
    cases = [("qwen-image", ""), ("flux", ""), ("flux2", ""), ("wan", ""), ("wan", "Wan2.2-T2V-A14B")]
    for family, origin in cases:
        variant = FAMILIES[family].variant({}, (), origin)
        sides = (variant.sampling.height, variant.sampling.width)
        assert [side % variant.target.size_factor for side in sides] == [0, 0], (family, origin)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_any_number_of_steps_has_a_sampler(family, steps):
    variant = FAMILIES[family].variant({}, (), "")
    scheduler = load_family(family).scheduler(variant, steps, (1, 16, 1, 64, 64))
    assert len(scheduler.timesteps) == steps and scheduler.sigmas.isfinite().all()
    assert float(scheduler.timesteps[0]) >= 999 and float(scheduler.sigmas[-1]) == 0
    assert (scheduler.sigmas.diff() < 0).all()


def test_shifts_by_the_number_of_tokens():
    """Of the published configurations: linear from 256 to 8192 tokens; of FLUX.2, from its own table."""
    assert token_shift(256, SCHEDULER) == pytest.approx(0.5) and token_shift(8192, SCHEDULER) == pytest.approx(0.9)
    assert empirical_shift(4096, 4) == pytest.approx(2.291, abs=1e-3)
    assert empirical_shift(4096, 50) == pytest.approx(2.0234, abs=1e-3)
    assert empirical_shift(8192, 4) == empirical_shift(8192, 50) == pytest.approx(1.843, abs=1e-3)

"""Decoded latents against what diffusers' pipelines draw of the same latents, float32, tiny weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffsynth_core.models import patches
from diffsynth_core.models.flux2 import forward as flux2_forward
from tests.parity.numbers import difference
from tests.parity.photographs import photograph, pixels_of

TOLERANCE = 1e-6
PROMPT = "an astronaut before a flag"
HEIGHT, WIDTH = 64, 96


@torch.no_grad()
def draw(pipeline: Any, height: int = HEIGHT, width: int = WIDTH, **more: Any) -> tuple[Tensor, Tensor]:
    """Return the latents after the last step of a pipeline, as its transformer has them, and the pixels, in [0, 1]."""
    found = []

    def keep(pipeline, step, timestep, tensors):
        found.append(tensors["latents"])
        return {}

    (pixels,) = pipeline(
        prompt=PROMPT, height=height, width=width, num_inference_steps=2, output_type="pt", return_dict=False,
        generator=torch.Generator().manual_seed(1), callback_on_step_end=keep, **more,
    )  # fmt: skip
    return found[-1], pixels


@torch.no_grad()
def check(family: Any, components: Any, latents: Tensor, expected: Tensor) -> None:
    """`expected`: `[B, 3, F, H, W]` in [0, 1]."""
    decoded = family.decode(components, latents)
    assert decoded.dtype == torch.float32
    assert expected.std() > 0.05, "there is something to compare"
    apart = difference(decoded / 2 + 0.5, expected)
    print(f"off by {apart:.1e}")
    assert apart < TOLERANCE


def test_qwen_images_are_decoded_as_in_the_pipeline(family, ours, pipeline):
    pipeline.set_progress_bar_config(disable=True)
    latents, pixels = draw(pipeline, true_cfg_scale=1.0)
    check(family, ours, patches.unpack(latents, HEIGHT // 8, WIDTH // 8), pixels[:, :, None])


def test_flux_images_are_decoded_as_in_the_pipeline(flux_pairs):
    pair = flux_pairs("FLUX.1")
    latents, pixels = draw(pair.pipeline)
    unpacked = patches.unpack(latents, HEIGHT // 8, WIDTH // 8)
    check(pair.ours.family, pair.ours.components, unpacked, pixels[:, :, None])


def test_flux2_images_are_decoded_as_in_the_pipeline(klein):
    latents, pixels = draw(klein.pipeline)
    unpacked = flux2_forward.unpack(latents, HEIGHT // 16, WIDTH // 16)
    check(klein.ours.family, klein.ours.components, unpacked, pixels[:, :, None])


@pytest.mark.parametrize("kind", ["T2V", "TI2V, text"])
def test_clips_are_decoded_as_in_the_pipeline(wan_pairs, kind):
    pair = wan_pairs(kind)
    pair.pipeline.set_progress_bar_config(disable=True)
    latents, pixels = draw(pair.pipeline, *pair.kind.size, num_frames=5, guidance_scale=1.0)
    check(pair.ours.family, pair.ours.components, latents, pixels.movedim(2, 1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen-image", "flux", "flux2", "wan"])
def test_the_size_of_the_target_comes_back(name, request, flux_pairs, wan_pairs, klein):
    """Random weights invert nothing, so that the tests above tell of numbers, and this one of shapes alone."""
    if name == "qwen-image":
        family, components = request.getfixturevalue("family"), request.getfixturevalue("ours")
    else:
        pair = {"flux": lambda: flux_pairs("FLUX.1"), "flux2": lambda: klein, "wan": lambda: wan_pairs("T2V")}[name]()
        family, components = pair.ours.family, pair.ours.components
    (target,) = (encoder for encoder in family.facts.variant({}, (), "").encoders if encoder.name == "latents")
    image = pixels_of(photograph("astronaut").resize((WIDTH, HEIGHT)))
    latents = family.encode(target, components, {target.columns[0]: image})["latents"]
    decoded = family.decode(components, torch.stack([latents, latents]))
    assert decoded.shape == (2, *image.shape) and decoded.min() >= -1 and decoded.max() <= 1

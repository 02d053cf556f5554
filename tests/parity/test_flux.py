"""FLUX.1's numbers against diffusers' `FluxPipeline` and `FluxKontextPipeline`, float32, tiny weights, real images.

Most tests of Kontext use a 64th of the published area; one uses all of it.
"""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux import pipeline_flux_kontext
from torch import Tensor

from diffsynth_core.models.flux.forward import token_ids
from diffsynth_core.models.flux.spec import kontext_size
from diffsynth_core.models.patches import numbered, pack
from diffsynth_core.training.objective import add_noise
from tests.parity.flux_models import FluxPair
from tests.parity.models import FEW_PIXELS, PUBLISHED_PIXELS, SIZE
from tests.parity.numbers import TOLERANCE, OneStep, check_batch_equals_singles, difference, noise_for, recorded
from tests.parity.photographs import PHOTOGRAPHS, photograph, pixels_of

CAPTIONS = {
    "empty": "",
    "plain": "a cat",
    "Chinese": "一只猫坐在桌子上,看着窗外。",
    "capitals and signs": "Three (3) CUPS, 100% red! Émoji 🙂 ﬁne\nand   blanks",
    "as long as CLIP reads": "a " * 75,
    "longer than CLIP reads": "bird " * 90,
    "longer than T5 reads": "word " * 600,
}


@pytest.fixture
def plain(flux_pairs) -> FluxPair:
    return flux_pairs("FLUX.1")


# Text


@torch.no_grad()
@pytest.mark.parametrize("caption", CAPTIONS.values(), ids=CAPTIONS)
def test_text_states_equal_the_pipelines(plain, caption):
    ours = plain.ours
    expected, expected_pooled, text_ids = plain.pipeline.encode_prompt(caption, None)
    first, second, _ = ours.variant.encoders
    pooled = ours.family.encode(first, ours.components, {"prompt": caption})["pooled_prompt_embeds"]
    states = ours.family.encode(second, ours.components, {"prompt": caption})["prompt_embeds"]
    print(
        f"T5 off by {difference(states[None], expected):.1e}, CLIP by {difference(pooled[None], expected_pooled):.1e}"
    )
    assert difference(states[None], expected) < TOLERANCE
    assert difference(pooled[None], expected_pooled) < TOLERANCE
    assert states.shape == (512, 64) and not text_ids.any()
    assert states.std() > 0.5 < pooled.std(), "there is something to compare"


@torch.no_grad()
def test_captions_are_told_apart(plain):
    ours = plain.ours
    encoded = [ours.encode(ours.sample(caption)) for caption in CAPTIONS.values()]
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        states = [sample[name] for sample in encoded]
        apart = [difference(one, other) for place, one in enumerate(states) for other in states[:place]]
        assert min(apart) > 0.1


@pytest.mark.parametrize(
    ("caption", "first", "second"),
    [
        ("plain", False, False),
        ("as long as CLIP reads", False, False),
        ("longer than CLIP reads", True, False),
        ("longer than T5 reads", True, True),
    ],
)
def test_captions_that_are_cut_are_told(plain, caption, first, second, complaints):
    ours = plain.ours
    sample = {"prompt": CAPTIONS[caption]}
    received = [
        ours.family.truncation_warning(encoder, ours.family.tokenize(encoder, ours.components, sample))
        for encoder in ours.variant.encoders[:2]
    ]
    assert received == [
        "captions are truncated to 77 tokens for CLIP (512 for T5)" if first else None,
        "captions are truncated to 512 tokens" if second else None,
    ]
    assert complaints() == []


# Images


@torch.no_grad()
@pytest.mark.parametrize("name", [*PHOTOGRAPHS, "upright"])
def test_latents_of_photographs_equal_the_vae_path(plain, name):
    """The pipeline's own preprocessing, and the inverse of its steps before decoding."""
    ours, pipeline = plain.ours, plain.pipeline
    image = photograph(name).resize(SIZE[::-1])
    raw = pipeline.vae.encode(pipeline.image_processor.preprocess(image)).latent_dist.mode()
    expected = (raw - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    latents = ours.encode(ours.sample("", name))["latents"]
    assert latents.shape == (16, 1, 8, 12)
    assert difference(latents.movedim(1, 0), expected) < TOLERANCE


@torch.no_grad()
def test_reference_images_are_encoded_like_those_that_are_made(flux_pairs):
    ours = flux_pairs("Kontext").ours
    images = [photograph("coffee"), photograph("upright")]
    encoded = ours.encode(ours.sample("", shown=images))
    found = numbered(ours.family.collate([encoded, encoded]), "kontext_latents_{}")
    assert [tuple(latents.shape) for latents in found] == [(2, 16, 1, 12, 18), (2, 16, 1, 20, 12)]
    height, width = kontext_size(*images[1].size, FEW_PIXELS)
    alone = {"image": pixels_of(images[1].resize((width, height), 1))}
    _, _, latents, _ = ours.variant.encoders
    assert difference(found[1][0], ours.family.encode(latents, ours.components, alone)["latents"]) < TOLERANCE


# Sigmas


def test_sigmas_equal_the_scheduler(plain):
    sigmas = plain.ours.family.sigmas()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(1000)
    assert difference(sigmas, scheduler.sigmas[:-1]) < 1e-6
    assert difference(sigmas, scheduler.timesteps / 1000) < 1e-6
    expected = {0: 1.0, 1: 0.999667, 499: 0.751494, 999: 0.008929}
    assert all(math.isclose(float(sigmas[index]), value, abs_tol=1e-6) for index, value in expected.items())
    base = np.linspace(1, 0.003 / 1.002, 1000)
    assert difference(sigmas, torch.tensor(3 * base / (1 + 2 * base))) < 1e-7
    assert sigmas.dtype == torch.float32


# The prediction


def run_pipeline(pair: FluxPair, caption: str, noisy: Tensor, sigma: Tensor) -> None:
    """Run one step of the pipeline from given latents."""
    height, width = SIZE
    pair.pipeline.scheduler = OneStep.at(sigma)
    pair.pipeline(
        **({"image": pair.shown[0], "max_area": height * width} if pair.shown else {}),
        prompt=caption,
        height=height,
        width=width,
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=pack(noisy),
        output_type="latent",
    )


@torch.no_grad()
def check_against_pipeline(pair: FluxPair, caption: str, index: int, max_pixels: int) -> None:
    """Check that inputs of the transformer, including positions and guidance, and its output equal the pipeline's."""
    ours = pair.ours
    sigma = ours.family.sigmas()[[index]]
    batch = ours.family.collate([ours.encode(ours.sample(caption, shown=pair.shown, max_pixels=max_pixels))])
    noisy = add_noise(batch["latents"], noise_for(batch["latents"], seed=index), sigma)
    with recorded(pair.pipeline.transformer, ours.transformer) as calls:
        run_pipeline(pair, caption, noisy, sigma)
        prediction = ours.predict(noisy, sigma, batch)

    (theirs, (expected,)), (mine, _) = calls
    made = (SIZE[0] // 16) * (SIZE[1] // 16)
    for name in ("txt_ids", "img_ids"):
        assert torch.equal(mine[name], theirs[name])
    assert torch.equal(mine["guidance"], theirs["guidance"]) and mine["guidance"].tolist() == [1.0]
    assert difference(mine["timestep"], theirs["timestep"]) < 1e-6
    assert mine["hidden_states"].shape[1] == made + sum(latents[0, 0].numel() // 4 for latents in shown_latents(batch))
    worst = {
        "T5": difference(mine["encoder_hidden_states"], theirs["encoder_hidden_states"]),
        "CLIP": difference(mine["pooled_projections"], theirs["pooled_projections"]),
        "tokens": difference(mine["hidden_states"], theirs["hidden_states"]),
        "prediction": difference(pack(prediction), expected[:, :made]),
    }
    said = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    print(f"{mine['hidden_states'].shape[1]} tokens, sigma {float(sigma):.4f}: {said}; spread {expected.std():.2f}")
    assert max(worst.values()) < TOLERANCE
    assert expected[:, :made].std() > 0.1, "there is something to compare"


def shown_latents(batch: Mapping[str, Tensor]) -> list[Tensor]:
    return numbered(batch, "kontext_latents_{}")


@pytest.fixture
def _small(monkeypatch) -> None:
    """Make the pipeline resize reference images to a 64th of their area."""
    sizes = pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
    shrunk = [(width // 8 // 16 * 16, height // 8 // 16 * 16) for width, height in sizes]
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", shrunk)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("index", [3, 900])
@pytest.mark.parametrize("caption", ["plain", "Chinese", "longer than T5 reads"])
def test_one_step_is_that_of_the_pipeline(flux, caption, index):
    check_against_pipeline(flux, CAPTIONS[caption], index, FEW_PIXELS)


@pytest.mark.parametrize("flux", ["Kontext"], indirect=True)
def test_one_step_is_that_of_the_pipeline_at_the_published_size(flux):
    check_against_pipeline(flux, CAPTIONS["plain"], 500, PUBLISHED_PIXELS)


@torch.no_grad()
def test_several_reference_images_follow_each_other_as_image_1(flux_pairs):
    """Their tokens follow those of the target, in order; only the target's part of the output is used."""
    ours = flux_pairs("Kontext").ours
    images = [photograph("coffee"), photograph("upright")]
    encoded = ours.encode(ours.sample("a cup", shown=images))
    batch = ours.family.collate([encoded])
    noisy, sigma = torch.zeros_like(batch["latents"]), torch.tensor([0.5])
    with recorded(ours.transformer) as calls:
        prediction = ours.predict(noisy, sigma, batch)
    (received, (output,)), shown = calls[0], shown_latents(batch)
    sequence = [noisy, *shown]
    assert torch.equal(received["hidden_states"], torch.cat([pack(latents) for latents in sequence], dim=1))
    assert torch.equal(
        received["img_ids"], torch.cat([token_ids(latents, n) for latents, n in zip(sequence, (0, 1, 1), strict=True)])
    )
    assert [count.item() for count in received["img_ids"][:, 0].int().bincount()] == [4 * 6, 6 * 9 + 10 * 6]
    assert torch.equal(received["img_ids"][-60:][[0, 1, -1]], torch.tensor([[1.0, 0, 0], [1, 0, 1], [1, 9, 5]]))
    assert torch.equal(pack(prediction), output[:, : 4 * 6])
    swapped = ours.family.collate([ours.encode(ours.sample("a cup", shown=images[::-1]))])
    other = ours.predict(noisy, sigma, swapped)
    assert difference(prediction, other) < TOLERANCE, "the order of tokens in one set has no effect"
    alone = ours.family.collate([ours.encode(ours.sample("a cup", shown=images[:1]))])
    assert difference(prediction, ours.predict(noisy, sigma, alone)) > 0.01


# Batches


@pytest.mark.parametrize("flux", ["FLUX.1", "Kontext"], indirect=True)
def test_a_batch_equals_its_singles(flux):
    ours = flux.ours
    samples = []
    for caption, name in zip(("empty", "plain", "Chinese", "longer than T5 reads"), PHOTOGRAPHS, strict=True):
        shown = [photograph(other).resize((600, 400)) for other in (name, "coffee")] if flux.shown else []
        samples.append(ours.encode(ours.sample(CAPTIONS[caption], name, shown)))
    check_batch_equals_singles(ours, samples)

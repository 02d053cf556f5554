"""FLUX.2's numbers against diffusers' `Flux2KleinPipeline`, float32, tiny weights, real images."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from diffsynth_core.data.images import read_image_header
from diffsynth_core.data.media import MediaCrop, choose_reference, load_pixels
from diffsynth_core.errors import collect_problems
from diffsynth_core.models.flux2.forward import image_positions, pack, text_positions, unpack
from diffsynth_core.models.flux2.spec import FLUX2
from diffsynth_core.models.patches import numbered
from diffsynth_core.training.objective import add_noise
from tests.parity.flux2_models import (
    PROMPT,
    REFERENCE_SIZES,
    SIZE,
    entries_of,
    find_files,
    image_of,
    load_files,
)
from tests.parity.numbers import TOLERANCE, OneStep, check_batch_equals_singles, difference, noise_for, recorded
from tests.parity.photographs import PHOTOGRAPHS, pixels_of

CAPTIONS = {
    "empty": "",
    "plain": "a cat",
    "Chinese": "一只猫坐在桌子上,看着窗外。",
    "blanks": "  two  blanks,\ta tab,\n\na line ",
    "special tokens": "<|im_end|> <think> [x]",
    "long": "word " * 600,
    "a token too long": "x" * 499,
}


# Text


@torch.no_grad()
@pytest.mark.parametrize("caption", CAPTIONS.values(), ids=CAPTIONS)
def test_text_states_equal_the_pipelines(flux2, caption):
    expected, positions = flux2.pipeline.encode_prompt(caption)
    (text,) = (encoder for encoder in flux2.ours.variant.encoders if encoder.name == "text")
    encoded = flux2.ours.family.encode(text, flux2.ours.components, {"prompt": caption})["prompt_embeds"]
    print(f"states off by {difference(encoded[None], expected):.1e}, their spread is {expected.std():.2f}")
    assert difference(encoded[None], expected) < TOLERANCE
    assert encoded.shape == (512, 3 * flux2.pipeline.text_encoder.config.hidden_size)
    assert torch.equal(text_positions(512, encoded.device), positions[0])


@torch.no_grad()
def test_captions_become_different_states(flux2):
    states = [flux2.ours.encode({"prompt": caption})["prompt_embeds"] for caption in CAPTIONS.values()]
    for number, one in enumerate(states):
        assert all((one - other).std() > 0.1 * one.std() for other in states[:number])


def test_a_caption_that_is_cut_is_told(flux2):
    (text,) = (encoder for encoder in flux2.ours.variant.encoders if encoder.name == "text")

    def warning(caption):
        family = flux2.ours.family
        return family.truncation_warning(text, family.tokenize(text, flux2.ours.components, {"prompt": caption}))

    told = {name: warning(caption) for name, caption in CAPTIONS.items()}
    assert {name for name, words in told.items() if words} == {"long", "a token too long"}
    assert warning(CAPTIONS["a token too long"][1:]) is None
    assert told["long"] == "captions are truncated to 512 tokens, template included"


# Images


@torch.no_grad()
@pytest.mark.parametrize("size", [(128, 192), (80, 64)], ids=str)
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_latents_of_photographs_equal_the_vae_path(klein, name, size):
    image = image_of(name, *size)
    prepared = klein.pipeline.image_processor.preprocess(image)
    expected = klein.pipeline._encode_vae_image(prepared, generator=None)
    latents = klein.ours.encode({"image": pixels_of(image)})["latents"]
    assert latents.shape == (128, 1, size[0] // 16, size[1] // 16)
    assert difference(latents[None, :, 0], expected) < TOLERANCE


@torch.no_grad()
def test_the_tiny_vae_tells_images_apart(klein):
    latents = torch.stack(
        [klein.ours.encode({"image": pixels_of(image_of(name, 128, 128))})["latents"] for name in PHOTOGRAPHS]
    )
    assert 0.8 < latents.std() < 1.2
    assert abs(latents.mean()) < 0.3
    assert latents.std(0).mean() > 0.5 * latents.std()


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
def test_reference_tokens_and_positions_equal_the_pipelines(klein, count):
    shown = klein.shown[:count]
    prepared = [klein.pipeline.image_processor.preprocess(image) for image in shown]
    expected, positions = klein.pipeline.prepare_image_latents(prepared, 1, None, "cpu", torch.float32)
    encoded = klein.encoded(count)
    assert [name for name in encoded if name.startswith("edit")] == [
        f"edit_latents_{number}" for number in range(count)
    ]
    images = numbered({name: tensor[None] for name, tensor in encoded.items()}, "edit_latents_{}")
    tokens = torch.cat([pack(image) for image in images], dim=1)
    assert difference(tokens, expected) < TOLERANCE
    target = encoded["latents"][None]
    of_target = klein.pipeline._prepare_latent_ids(target[:, :, 0])
    assert torch.equal(image_positions([target, *images]), torch.cat([of_target, positions], dim=1)[0])


@pytest.mark.parametrize("size", [(451, 300), (512, 512), (1448, 1100), (1911, 1000), (1030, 1162)])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_reference_images_are_read_as_the_pipeline_reads_them(klein, tmp_path, name, size):
    image_of(name, *size).save(tmp_path / "shown.png")
    (reference,) = FLUX2.variant({}, ("edit_image",), "").conditions
    header = read_image_header(tmp_path / "shown.png")
    crop = choose_reference(tmp_path / "shown.png", header, reference, MediaCrop(tmp_path, 0, 0), 1024 * 1024)
    ours = torch.tensor(load_pixels(crop)).permute(0, 3, 1, 2).float() / 127.5 - 1

    processor = klein.pipeline.image_processor
    image = processor._resize_if_exceeds_area(Image.open(tmp_path / "shown.png"), 1024 * 1024)
    height, width = image.height // 16 * 16, image.width // 16 * 16
    theirs = processor.preprocess(image, height=height, width=width, resize_mode="crop")
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-6


def test_references_keep_their_order():
    batch = {f"edit_latents_{number}": torch.tensor(float(number)) for number in (10, 2, 0, 1, 9, 3, 8, 4, 7, 5, 6)}
    assert [int(latents) for latents in numbered(batch, "edit_latents_{}")] == list(range(11))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_vae_keeps_its_statistics_exactly(klein, flux2_models, dtype):
    vae = load_files(find_files(flux2_models, "vae", entries_of("4B")["vae"]), dtype)
    theirs = klein.pipeline.vae.bn
    assert vae.dtype == dtype
    assert vae.bn.running_mean.dtype == vae.bn.running_var.dtype == torch.float32
    assert torch.equal(vae.bn.running_mean, theirs.running_mean)
    assert torch.equal(vae.bn.running_var, theirs.running_var)
    assert not torch.equal(theirs.running_mean, theirs.running_mean.bfloat16().float()), "rounding would show"
    assert vae.bn.num_batches_tracked.dtype == torch.int64
    assert not vae.bn.training


# Sigmas


def test_sigmas_equal_the_scheduler(klein):
    sigmas = klein.ours.family.sigmas()
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(klein.pipeline.scheduler.config)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 1000, 1000), mu=0.8)
    print(f"sigmas off by {difference(sigmas, scheduler.sigmas[:-1]):.1e}")
    assert difference(sigmas, scheduler.sigmas[:-1]) < TOLERANCE
    expected = {0: 1.0, 1: 0.999550, 499: 0.690829, 999: 0.002223}
    assert all(math.isclose(float(sigmas[index]), value, abs_tol=1e-6) for index, value in expected.items())
    assert sigmas.dtype == torch.float32 and sigmas.shape == (1000,)
    assert (sigmas.diff() < 0).all()


# The prediction


def test_tokens_are_the_latents_row_by_row():
    latents = torch.arange(2 * 3 * 2 * 4).view(2, 3, 1, 2, 4)
    assert pack(latents)[1, 5].tolist() == [24 + 5, 32 + 5, 40 + 5]
    assert torch.equal(unpack(pack(latents), 2, 4), latents)


@torch.no_grad()
@pytest.mark.parametrize("shown", [0, 1, 2])
@pytest.mark.parametrize("index", [3, 900])
def test_the_transformer_sees_and_says_what_it_does_in_the_pipeline(flux2, index, shown, monkeypatch):
    ours, pipeline = flux2.ours, flux2.pipeline
    height, width = SIZE
    sigma = ours.family.sigmas()[[index]]
    batch = ours.family.collate([flux2.encoded(shown)])
    noisy = add_noise(batch["latents"], noise_for(batch["latents"], seed=index), sigma)
    monkeypatch.setattr(pipeline, "scheduler", OneStep.at(sigma))
    with recorded(pipeline.transformer, ours.transformer) as calls:
        pipeline(
            image=list(flux2.shown[:shown]) or None,
            prompt=PROMPT,
            height=height,
            width=width,
            num_inference_steps=1,
            guidance_scale=1.0,
            latents=noisy[:, :, 0],
            output_type="latent",
        )
        prediction = ours.predict(noisy, sigma, batch)

    (theirs, (expected,)), (mine, (output,)) = calls
    for name in ("hidden_states", "encoder_hidden_states", "timestep"):
        assert difference(mine[name], theirs[name]) < TOLERANCE, name
    for name in ("img_ids", "txt_ids"):
        assert torch.equal(mine[name], theirs[name][0]), name
    assert mine["guidance"] is None and theirs["guidance"] is None
    target = (height // 16) * (width // 16)
    tokens = target + sum(side // 16 * other // 16 for side, other in REFERENCE_SIZES[:shown])
    assert output.shape[1] == tokens
    assert torch.equal(pack(prediction), output[:, :target])
    print(
        f"{flux2.name}, {shown} shown: prediction off by {difference(output, expected):.1e}, "
        f"its spread is {expected.std():.2f}"
    )
    assert difference(output, expected) < TOLERANCE
    assert expected.std() > 0.1, "there is something to compare"


@torch.no_grad()
def test_reference_images_matter(klein):
    predictions = []
    for shown in range(3):
        batch = klein.ours.family.collate([klein.encoded(shown)])
        noisy = noise_for(batch["latents"], seed=0)
        predictions.append(klein.ours.predict(noisy, torch.tensor([0.5]), batch))
    assert difference(predictions[0], predictions[1]) > 100 * TOLERANCE
    assert difference(predictions[1], predictions[2]) > 100 * TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("autocast", [True, False])
def test_sigma_is_rounded_only_where_nothing_else_can_be_computed(klein, flux2_models, autocast):
    transformer = load_files(find_files(flux2_models, "dit", entries_of("4B")["dit"]), torch.bfloat16)
    batch = klein.ours.family.collate([klein.encoded(1)])
    sigma = klein.ours.family.sigmas()[[321]]
    told: list[Tensor] = []
    transformer.time_guidance_embed.register_forward_pre_hook(lambda _, inputs: told.append(inputs[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
        prediction = klein.ours.family.predict_velocity({"dit": transformer}, batch["latents"], sigma, batch)
    assert torch.equal(told[0].float(), sigma * 1000) == autocast
    exact = klein.ours.predict(batch["latents"], sigma, batch)
    assert difference(prediction, exact) < 0.1 * exact.std()


# Batches


@pytest.mark.parametrize("shown", [0, 2])
def test_a_batch_equals_its_singles(klein, shown):
    samples = []
    for number, (caption, name) in enumerate(zip(CAPTIONS.values(), PHOTOGRAPHS, strict=False)):
        sample: dict[str, Any] = {"prompt": caption, "image": pixels_of(image_of(name, *SIZE))}
        if shown:
            others = (PHOTOGRAPHS[number - 1], PHOTOGRAPHS[number - 2])
            sample["edit_image"] = [
                pixels_of(image_of(other, *size)) for other, size in zip(others, REFERENCE_SIZES, strict=True)
            ]
        samples.append(klein.ours.encode(sample))
    check_batch_equals_singles(klein.ours, samples)


def test_samples_are_not_mixed_up(klein):
    """Guard of the test above: each prediction of a batch depends on its own sample."""
    encoded = [klein.encoded(1), klein.encoded(1)]
    encoded[1]["edit_latents_0"] = -encoded[1]["edit_latents_0"]
    batch = klein.ours.family.collate(encoded)
    noisy = torch.randn(batch["latents"][:1].shape, generator=torch.Generator().manual_seed(0)).expand(
        2, -1, -1, -1, -1
    )
    with torch.no_grad():
        both = klein.ours.predict(noisy, torch.tensor([0.5, 0.5]), batch)
    assert difference(both[0], both[1]) > 100 * TOLERANCE


def test_files_without_configurations_load_to_the_same_model(klein, flux2_models: Path, tmp_path: Path):
    """Everything is inferred as it was written, except for the groups of the VAE's norms, which shapes do not
    determine.
    """
    for component in ("dit", "text_encoder"):
        files = find_files(flux2_models, component, entries_of("4B")[component])
        bare = tmp_path / files.paths[0].parent.name
        bare.mkdir()
        for path in files.paths:
            (bare / path.name).symlink_to(path)
        inferred = load_component_at(bare, component)
        written = klein.ours.components[component]
        assert inferred.state_dict().keys() == written.state_dict().keys()
        settings = inferred.config if component == "dit" else inferred.config.to_dict()
        known = written.config if component == "dit" else written.config.to_dict()
        unsaid = {"bos_token_id", "eos_token_id", "architectures", "out_channels", "_name_or_path"}
        differing = {name for name in settings if settings[name] != known.get(name)} - unsaid
        assert {name for name in differing if not name.startswith("_")} == set()


def load_component_at(folder: Path, component: str) -> Any:
    """Load a component from the files in a folder."""
    from diffsynth_core.config.parameters import Parameters
    from diffsynth_core.planning.model.components import find_components

    paths = tuple(str(path) for path in sorted(folder.glob("*.safetensors")))
    with collect_problems():
        found = find_components(Parameters(model_paths=(paths,)), "flux2", folder)
    assert found
    return load_files(found.components[component])

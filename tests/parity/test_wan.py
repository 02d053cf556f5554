"""Wan's numbers against diffusers' `WanPipeline` and `WanImageToVideoPipeline`, float32, tiny weights, real pixels."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer

from diffsynth_core.models.wan.encode import clean_caption
from diffsynth_core.training.objective import add_noise, velocity_loss
from tests.parity.numbers import TOLERANCE, OneStep, check_batch_equals_singles, difference, noise_for, recorded
from tests.parity.photographs import PHOTOGRAPHS, pixels_of
from tests.parity.wan_models import KINDS, PROMPT, WanPair, clip_of, images_of

CAPTIONS = {
    "empty": "",
    "plain": "a cat",
    "entities": "fish &amp; chips <hot>, &amp;quot;very&amp;quot; &eacute;",
    "broken encodings": "schÃ¶n â€œquotedâ€\x9d voilÃ\xa0 lâ€™Ã©tÃ©",
    "blanks": "  two  blanks,\ta tab,\n\na line\u3000and\u00a0more \x0b\x1c\u2028 ",
    "Chinese": "一只猫坐在桌子上,看着窗外。",
    "emoji": "émoji 🙂 ﬁne",
    "long": "word " * 600,
    "as long as can be": "a " * 255 + "a",
}


@pytest.fixture
def text_to_video(wan_pairs) -> WanPair:
    return wan_pairs("T2V")


# Text


@torch.no_grad()
@pytest.mark.parametrize("caption", CAPTIONS.values(), ids=CAPTIONS)
def test_text_states_equal_the_pipelines(text_to_video, caption):
    ours, pipeline = text_to_video.ours, text_to_video.pipeline
    expected, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=512)
    text, *_ = ours.variant.encoders
    encoded = ours.family.encode(text, ours.components, {"prompt": caption})
    batch = ours.family.collate([encoded])
    assert difference(batch["prompt_embeds"], expected) < TOLERANCE
    length = len(encoded["prompt_embeds"])
    assert not batch["prompt_embeds"][:, length:].any()


def test_captions_are_mended():
    assert clean_caption(CAPTIONS["entities"]) == 'fish & chips <hot>, "very" é'
    assert clean_caption(CAPTIONS["broken encodings"]) == 'schön "quoted" voilà l\'été'
    assert clean_caption(CAPTIONS["blanks"]) == "two blanks, a tab, a line and more"


@pytest.mark.parametrize("caption", ["", "a cat", "three (3) cups, 100% red!", CAPTIONS["long"]])
def test_the_tokenizer_is_the_one_transformers_makes_but_for_rare_characters(text_to_video, wan_models, caption):
    """transformers 5 rebuilds UMT5's tokenizer without byte fallback, so that rare characters are unknown."""
    tokenizer = text_to_video.ours.components["tokenizer_path"]
    made = AutoTokenizer.from_pretrained(wan_models / f"{text_to_video.kind.model_id}-Diffusers" / "tokenizer")
    assert tokenizer(caption)["input_ids"] == made(caption)["input_ids"]
    assert tokenizer.unk_token_id not in tokenizer(CAPTIONS["Chinese"])["input_ids"]


# Clips


def normalized(vae: Any, raw: Tensor) -> Tensor:
    """Normalize latents: the inverse of both pipelines before decoding, and as in `prepare_latents`."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return (raw - mean) / std


@torch.no_grad()
@pytest.mark.parametrize("wan", ["T2V", "TI2V, text"], indirect=True)
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_latents_of_clips_equal_the_vae_path(wan, name):
    clip = clip_of(name, 5, *wan.kind.size)
    frames = [Image.fromarray(frame) for frame in clip]
    prepared = wan.pipeline.video_processor.preprocess_video(frames, *wan.kind.size)
    expected = normalized(wan.pipeline.vae, wan.pipeline.vae.encode(prepared).latent_dist.mode())
    latents = wan.ours.encode({"prompt": "", "video": pixels_of(clip)})["latents"]
    assert difference(latents[None], expected) < TOLERANCE
    assert latents.shape == ((48, 2, 4, 2) if wan.kind.newer_vae else (16, 2, 4, 6))


@torch.no_grad()
@pytest.mark.parametrize("wan", ["T2V", "TI2V, text"], indirect=True)
def test_the_tiny_vae_tells_clips_apart(wan):
    latents = torch.stack(
        [
            wan.ours.encode({"prompt": "", "video": pixels_of(clip_of(name, 5, *wan.kind.size))})["latents"]
            for name in PHOTOGRAPHS
        ]
    )
    assert latents.std(0).mean() > 0.5 * latents.std()
    assert latents.diff(dim=2).std() > 0.1 * latents.std(), "frames differ"


@torch.no_grad()
@pytest.mark.parametrize("wan", [name for name, kind in KINDS.items() if kind.shown], indirect=True)
def test_what_the_model_is_shown_equals_the_pipelines(wan):
    """The mask and condition channels of I2V, or the clean first frame of TI2V; CLIP's states."""
    encoded, images = wan.encoded, images_of(wan.clip, wan.kind.shown)
    prepared = {name: wan.pipeline.video_processor.preprocess(image) for name, image in images.items()}
    _, condition, *mask = wan.pipeline.prepare_latents(
        prepared["image"], 1, wan.pipeline.vae.config.z_dim, *wan.kind.size, len(wan.clip), torch.float32, "cpu",
        last_image=prepared.get("last_image"),
    )  # fmt: skip
    if wan.kind.newer_vae:
        assert difference(encoded["latents"][None, :, :1], condition) < TOLERANCE
        assert torch.equal((1 - encoded["given"]).expand_as(mask[0][0]), mask[0][0])
        return
    assert torch.equal(encoded["condition"][:4], condition[0, :4])
    assert difference(encoded["condition"][None], condition) < TOLERANCE
    if wan.kind.image_encoder:
        states = wan.pipeline.encode_image(list(images.values()))
        assert difference(encoded["image_embeds"], states.flatten(0, 1)) < TOLERANCE


# Sigmas


def test_sigmas_equal_the_scheduler(text_to_video):
    sigmas = text_to_video.ours.family.sigmas()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    assert difference(sigmas, scheduler.sigmas) < TOLERANCE
    assert difference(sigmas, scheduler.timesteps / 1000) < TOLERANCE
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, 1001)[:-1])
    assert difference(sigmas, scheduler.sigmas[:-1]) < TOLERANCE
    expected = {0: 1.0, 1: 0.999800, 499: 0.833888, 999: 0.004980}
    assert all(math.isclose(float(sigmas[index]), value, abs_tol=1e-6) for index, value in expected.items())
    assert sigmas.dtype == torch.float32


# The prediction


@torch.no_grad()
@pytest.mark.parametrize("index", [3, 900])
def test_the_transformer_sees_and_says_what_it_does_in_the_pipeline(wan, index, monkeypatch):
    ours, pipeline = wan.ours, wan.pipeline
    height, width = wan.kind.size
    sigma = ours.family.sigmas()[[index]]
    batch = ours.family.collate([wan.encoded])
    noise = noise_for(batch["latents"], seed=index)
    noisy = add_noise(batch["latents"], noise, sigma, batch.get("given"))
    monkeypatch.setattr(pipeline, "scheduler", OneStep.at(sigma))
    pipeline.set_progress_bar_config(disable=True)
    with recorded(pipeline.transformer, ours.transformer) as calls:
        pipeline(
            **images_of(wan.clip, wan.kind.shown),
            prompt=PROMPT,
            height=height,
            width=width,
            num_frames=len(wan.clip),
            num_inference_steps=1,
            guidance_scale=1.0,
            latents=add_noise(batch["latents"], noise, sigma),
            output_type="latent",
        )
        prediction = ours.predict(noisy, sigma, batch)

    (theirs, (expected,)), (mine, (output,)) = calls
    for name in ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_image"):
        if theirs.get(name) is None:
            assert mine.get(name) is None
        else:
            assert difference(mine[name], theirs[name]) < TOLERANCE
    timestep = mine["timestep"]
    if timestep.ndim < theirs["timestep"].ndim:  # the pipeline gives every token the one timestep
        timestep = timestep[:, None].expand_as(theirs["timestep"])
    assert torch.equal(timestep, theirs["timestep"])
    assert torch.equal(prediction, output)
    print(f"prediction off by {difference(prediction, expected):.1e}, its spread is {expected.std():.2f}")
    assert difference(prediction, expected) < TOLERANCE
    assert expected.std() > 0.1, "there is something to compare"


# Latents that are given


@pytest.mark.parametrize("wan", ["TI2V, image"], indirect=True)
def test_given_latents_are_neither_noised_nor_learned(wan):
    batch = wan.ours.family.collate([wan.encoded, wan.encoded])
    latents, given = batch["latents"], batch["given"]
    sigma = torch.tensor([0.9, 0.4])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    noisy = add_noise(latents, noise, sigma, given)
    assert torch.equal(noisy[:, :, :1], latents[:, :, :1])
    assert difference(noisy[:, :, 1:], add_noise(latents, noise, sigma)[:, :, 1:]) == 0
    prediction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    loss = velocity_loss(prediction, latents, noise, torch.tensor([1.0, 0.5]), given)
    means = (prediction - (noise - latents))[:, :, 1:].pow(2).mean(dim=(1, 2, 3, 4)) * torch.tensor([1.0, 0.5])
    assert difference(loss, means) < TOLERANCE
    loss.sum().backward()
    assert not prediction.grad[:, :, 0].any()
    assert prediction.grad[:, :, 1:].all()


# Batches


@pytest.mark.parametrize("wan", ["T2V", "I2V 2.1", "FLF2V", "TI2V, image"], indirect=True)
def test_a_batch_equals_its_singles(wan):
    captions = [CAPTIONS[name] for name in ("empty", "plain", "Chinese", "entities")]
    samples = [
        wan.ours.encode({"prompt": caption, "video": pixels_of(clip_of(name, 5, *wan.kind.size))})
        for caption, name in zip(captions, PHOTOGRAPHS, strict=True)
    ]
    assert len({len(sample["prompt_embeds"]) for sample in samples}) == 4
    check_batch_equals_singles(wan.ours, samples)

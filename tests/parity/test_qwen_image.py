"""Qwen-Image's numbers against diffusers' `QwenImagePipeline`, float32, tiny weights, real images."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth_core.data.images import load_image
from diffsynth_core.data.synthetic_images import draw_images
from diffsynth_core.models.patches import pack
from diffsynth_core.models.qwen_image.spec import QWEN_IMAGE
from tests.parity.numbers import TOLERANCE, difference
from tests.parity.photographs import PHOTOGRAPHS, photograph, pixels_of

TEXT, LATENTS = QWEN_IMAGE.variant({}, (), "").encoders
CAPTIONS = [
    "",
    "a cat",
    "an astronaut in an orange suit before a flag",
    "Ein Krug, 漢字, émoji 🙂 and\nnewlines",
    "word " * 1500,
]
IMAGES = (*PHOTOGRAPHS, "hubble_deep_field")


@torch.no_grad()
@pytest.mark.parametrize("caption", CAPTIONS, ids=lambda caption: f"{len(caption)} characters")
def test_prompt_embeddings_equal_the_pipelines(family, ours, pipeline, caption):
    expected, mask = pipeline.encode_prompt(caption)
    encoded = family.encode(TEXT, ours, {"prompt": caption})["prompt_embeds"]
    assert mask is None
    assert difference(encoded[None], expected) < TOLERANCE


@torch.no_grad()
def test_padded_embeddings_and_mask_equal_the_pipelines(family, ours, pipeline):
    captions = CAPTIONS[:4]
    expected, expected_mask = pipeline.encode_prompt(captions)
    latents = torch.zeros(16, 1, 8, 8)
    batch = family.collate(
        [{**family.encode(TEXT, ours, {"prompt": caption}), "latents": latents} for caption in captions]
    )
    assert torch.equal(batch["prompt_mask"], expected_mask.bool())
    assert difference(batch["prompt_embeds"], expected) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", IMAGES)
def test_latents_of_photographs_equal_the_vae_path(family, ours, pipeline, name, tmp_path):
    photograph(name).save(tmp_path / "photograph.png")
    image = load_image(tmp_path / "photograph.png", 192, 256)
    _check_latents(family, ours, pipeline, image)


@torch.no_grad()
def test_latents_of_drawn_images_equal_the_vae_path(family, ours, pipeline, tmp_path):
    for path in sorted(draw_images(tmp_path / "drawn").glob("*.*[gp]")):
        _check_latents(family, ours, pipeline, load_image(path, 176, 208))


def _check_latents(family, ours, pipeline, image: np.ndarray) -> None:
    # The pipeline's own preprocessing, and the inverse of the normalization it applies before decoding.
    prepared = pipeline.image_processor.preprocess(Image.fromarray(image))[:, :, None]
    encoded = pipeline.vae.encode(prepared).latent_dist.mode()
    mean = torch.tensor(pipeline.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(pipeline.vae.config.latents_std).view(1, -1, 1, 1, 1)
    latents = family.encode(LATENTS, ours, {"image": pixels_of(image)})["latents"]
    assert difference(latents[None], (encoded - mean) / std) < TOLERANCE


@torch.no_grad()
def test_the_tiny_vae_tells_images_apart(family, ours):
    images = [np.asarray(photograph(name).resize((128, 128))) for name in IMAGES]
    latents = torch.stack([family.encode(LATENTS, ours, {"image": pixels_of(image)})["latents"] for image in images])
    assert latents.std(0).mean() > 0.5 * latents.std()


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(7,), (5, 5), (3, 12)], ids=str)
def test_prediction_equals_the_transformer_called_as_the_pipeline_calls_it(family, ours, pipeline, lengths):
    generator = torch.Generator().manual_seed(1)
    height, width = 12, 20
    noisy = torch.randn(len(lengths), 16, 1, height, width, generator=generator)
    sigma = torch.linspace(0.1, 0.9, len(lengths))
    width_of_text = pipeline.transformer.config.joint_attention_dim
    texts = [torch.randn(length, width_of_text, generator=generator) for length in lengths]
    batch = family.collate(
        [{"prompt_embeds": text, "latents": latents} for text, latents in zip(texts, noisy, strict=True)]
    )

    packed = pipeline._pack_latents(noisy[:, :, 0], len(lengths), 16, height, width)
    (expected,) = pipeline.transformer(
        hidden_states=packed,
        timestep=sigma,
        guidance=None,
        encoder_hidden_states_mask=batch.get("prompt_mask"),
        encoder_hidden_states=batch["prompt_embeds"],
        img_shapes=[[(1, height // 2, width // 2)]] * len(lengths),
        return_dict=False,
    )
    prediction = family.predict_velocity(ours, noisy, sigma, batch)
    assert difference(pack(prediction), expected) < TOLERANCE
    assert difference(prediction, pipeline._unpack_latents(expected, height * 8, width * 8, 8)) < TOLERANCE


def test_sigmas_equal_the_scheduler(family, pipeline):
    sigmas = family.sigmas()
    pipeline.scheduler.set_timesteps(sigmas=np.linspace(1, 0, 1001)[:-1], mu=0.8)
    assert difference(sigmas, pipeline.scheduler.sigmas[:-1]) < TOLERANCE
    expected = {0: 1.0, 1: 0.999558, 499: 0.696338, 999: 0.02}
    assert all(math.isclose(float(sigmas[index]), value, abs_tol=1e-6) for index, value in expected.items())
    assert sigmas.dtype == torch.float32

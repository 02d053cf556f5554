"""Training learns: four photographs, about 100 steps, against predicting zero, at noise and sigmas that were not
trained on.

The measurement is independent of our code: captions and images are encoded by diffusers, paired as in the dataset, and
the checkpoint is loaded by diffusers. So neither a learning rate of 0 nor mixed-up captions or images can pass.
"""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from diffsynth_core.models.qwen_image.tiny import TinySizes, write_tiny_weights
from tests.conftest import CAPTIONS, MODEL_ID, PLACES, write_metadata

SIGMAS = (0.35, 0.5, 0.65, 0.8, 0.9, 0.95)
LORA = ("--recipe", "qwen-image-lora")
FULL = ("--recipe", "qwen-image-full")
STEPS = {LORA: 120, FULL: 60}
LEARNED = 0.85
"""Maximum error relative to predicting zero; a LoRA reaches 0.75, full training 0.4, swapped captions 0.96."""


@pytest.fixture(scope="module")
def base(tiny_models, tmp_path_factory) -> Path:
    """Models whose transformer has 4 blocks of 256 channels."""
    folder = tmp_path_factory.mktemp("learning") / "models"
    shutil.copytree(tiny_models, folder)
    shutil.rmtree(folder / MODEL_ID / "transformer")
    write_tiny_weights(folder, "dit", MODEL_ID, PLACES["dit"], TinySizes(blocks=4, heads=4, head_size=64))
    return folder


@pytest.fixture(scope="module")
def pipeline(base) -> QwenImagePipeline:
    folder = base / MODEL_ID
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        tokenizer=Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
        transformer=QwenImageTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32),
    )


@torch.no_grad()
def share_of_predicting_zero(pipeline: QwenImagePipeline, transformer, photographs: Path) -> float:
    """Return the mean squared error of the transformer relative to predicting zero, at fixed noise and sigmas."""
    generator = torch.Generator().manual_seed(12345)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std)
    )
    error = zero = 0.0
    for name, caption in CAPTIONS.items():
        pixels = pipeline.image_processor.preprocess(Image.open(photographs / f"{name}.png"))[:, :, None]
        latents = (pipeline.vae.encode(pixels).latent_dist.mode() - mean) / std
        embeds, _ = pipeline.encode_prompt(caption)
        for sigma in SIGMAS:
            noise = torch.randn(latents.shape, generator=generator)
            noisy = (1 - sigma) * latents + sigma * noise
            target = pipeline._pack_latents(noise - latents, 1, 16, *latents.shape[-2:])
            (prediction,) = transformer(
                hidden_states=pipeline._pack_latents(noisy, 1, 16, *latents.shape[-2:]),
                timestep=torch.tensor([sigma]),
                encoder_hidden_states=embeds,
                img_shapes=[[(1, latents.shape[-2] // 2, latents.shape[-1] // 2)]],
                return_dict=False,
            )
            error += float((prediction - target).pow(2).mean())
            zero += float(target.pow(2).mean())
    return error / zero


@pytest.fixture
def train_and_measure(cli, monkeypatch, base, pipeline, photographs, tmp_path):
    """Train on a dataset, load the checkpoint with diffusers, and measure on the original photographs."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(base))

    def run(recipe: tuple[object, ...], dataset: Path, learning_rate: float, steps: int) -> float:
        outcome = cli(
            "train", *recipe, "--batch_size", 4, "--dataset_num_workers", 0, "--no-use_gradient_checkpointing", "--max_steps", steps, "--num_epochs", 30,
            "--dataset_base_path", dataset, "--learning_rate", learning_rate, "--save_steps", steps, "--output_path", tmp_path / "out",
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        transformer = QwenImageTransformer2DModel.from_pretrained(
            base / MODEL_ID / "transformer", torch_dtype=torch.float32
        )
        if recipe is FULL:
            transformer.load_state_dict(
                {
                    name: tensor.float()
                    for name, tensor in load_file(tmp_path / "out" / f"step-{steps}.safetensors").items()
                }
            )
        else:
            pipeline.transformer = transformer
            pipeline.load_lora_weights(str(tmp_path / "out"), weight_name=f"step-{steps}.safetensors")
        return share_of_predicting_zero(pipeline, transformer, photographs)

    return run


@pytest.mark.parametrize("recipe", [LORA, pytest.param(FULL, marks=pytest.mark.long)], ids=["lora", "full"])
def test_it_learns(train_and_measure, photographs, recipe):
    share = train_and_measure(recipe, photographs, 2e-3, STEPS[recipe])
    print(f"{recipe[1]}: {share:.3f} of predicting zero")
    assert share < LEARNED


def test_learning_rate_0_does_not_pass(train_and_measure, photographs):
    """The weights are the same after any number of steps."""
    assert train_and_measure(LORA, photographs, 0.0, steps=2) > LEARNED


@pytest.mark.long
def test_swapped_samples_do_not_pass(train_and_measure, photographs, tmp_path):
    """The result of training on mixed-up pairs: each caption with the next image."""
    dataset = tmp_path / "swapped"
    shutil.copytree(photographs, dataset)
    captions = list(CAPTIONS.values())
    pairs = zip(CAPTIONS, captions[1:] + captions[:1], strict=True)
    write_metadata(dataset, [(f"{name}.png", caption) for name, caption in pairs])
    share = train_and_measure(LORA, dataset, 2e-3, STEPS[LORA])
    print(f"captions swapped: {share:.3f} of predicting zero")
    assert share > LEARNED

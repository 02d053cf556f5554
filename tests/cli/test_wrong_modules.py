"""Components and extra inputs that do not fit together: reported before reading weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffsynth_core.models.flux import tiny as tiny_flux
from diffsynth_core.models.qwen_image import tiny as tiny_qwen
from tests.conftest import ENTRIES
from tests.naming import names

CONTROLNET = "InstantX/Qwen-Image-ControlNet-Union:diffusion_pytorch_model.safetensors"
FOLLOW = ("--extra_inputs", "controlnet_image", "--data_file_keys", "image,controlnet_image")


@pytest.fixture
def write(models: Path) -> Callable[..., Path]:
    """Write a ControlNet where the runs of this file look for it; return its file."""

    def make(tiny: Any = tiny_qwen, **sizes: int) -> Path:
        model_id, place = CONTROLNET.split(":")
        tiny.write_tiny_weights(models, "controlnet", model_id, place, tiny.TinySizes(**sizes))
        return models / model_id / place

    return make


@pytest.fixture
def pairs(dataset: Path) -> Path:
    rows = [{"image": "chelsea.png", "prompt": "a cat", "controlnet_image": "coffee.png"}]
    (dataset / "metadata.json").write_text(json.dumps(rows))
    (dataset / "metadata.csv").unlink()
    return dataset


def named(*more: str) -> tuple[str, str]:
    return "--model_id_with_origin_paths", ",".join((*ENTRIES.values(), *more))


def test_an_image_to_follow_without_a_controlnet(refuse, pairs):
    message = names("no controlnet weights", "Qwen-Image with a ControlNet")
    assert refuse(*FOLLOW) == (2, [(message, names("--model_paths", "--model_id_with_origin_paths"))])


def test_a_controlnet_without_an_image_to_follow(refuse, write):
    write()
    message = names(CONTROLNET, "controlnet", "Qwen-Image", "controlnet_image", "not in `extra_inputs`")
    hint = names("--extra_inputs controlnet_image")
    assert refuse(*named(CONTROLNET)) == (2, [(message, hint)])


@pytest.mark.parametrize("typed", ["controlnet", "controlnet.controlnet_blocks"])
def test_a_controlnet_is_to_be_trained_that_nobody_asked_for(refuse, typed):
    message = names("trainable_models", "controlnet", "Qwen-Image", "does not have")
    hint = names("remove it", "--extra_inputs controlnet_image")
    assert refuse("--trainable_models", typed) == (2, [(message, hint)])


def test_the_column_and_its_key_are_missed(refuse, write, dataset):
    write()
    code, problems = refuse(*named(CONTROLNET), "--extra_inputs", "controlnet_image")
    assert code == 2 and problems == [
        (
            names("data_file_keys", "not include", "controlnet_image"),
            names("--data_file_keys image,video,controlnet_image"),
        ),
        (names(f"{dataset}/metadata.csv", "no column", "controlnet_image", "image", "prompt"), "add the column"),
    ]


def test_the_controlnet_of_another_width(refuse, write, pairs):
    write(heads=4)
    message = names("controlnet", CONTROLNET, "64 channels", "dit of Qwen-Image with a ControlNet", 32)
    assert refuse(*named(CONTROLNET), *FOLLOW) == (2, [(message, names("controlnet", "same model"))])


def test_the_controlnet_of_other_texts(refuse, write, pairs):
    write(text_width=128)
    message = names("controlnet", CONTROLNET, "text states", "128 channels", "dit of Qwen-Image with a ControlNet", 64)
    assert refuse(*named(CONTROLNET), *FOLLOW) == (2, [(message, names("controlnet", "same model"))])


def test_a_controlnet_for_inpainting(refuse, write, pairs):
    path = write()
    tensors = load_file(path)
    width = len(tensors["controlnet_x_embedder.weight"])
    tensors["controlnet_x_embedder.weight"] = torch.zeros(width, 68, dtype=torch.bfloat16)
    save_file(tensors, path)
    config = json.loads((path.parent / "config.json").read_text()) | {"extra_condition_channels": 4}
    (path.parent / "config.json").write_text(json.dumps(config))
    message = names("controlnet", CONTROLNET, "68 channels", "dit of Qwen-Image with a ControlNet", 64)
    hint = names("ControlNet", "inpainting")
    assert refuse(*named(CONTROLNET), *FOLLOW) == (2, [(message, hint)])


def test_the_controlnet_of_another_family(refuse, write, pairs):
    write(tiny_flux)
    message = names(CONTROLNET, "FLUX.1 ControlNet", "not a component", "Qwen-Image")
    hint = names("dit", "text_encoder", "vae", "controlnet")
    assert refuse(*named(CONTROLNET), *FOLLOW) == (2, [(message, hint)])


def test_a_controlnet_that_is_not_supported(refuse, write, pairs):
    path = write()
    extra = {f"controlnet_blocks.0.{name}_rms.weight": torch.zeros(2) for name in "xy"}
    save_file(load_file(path) | extra, path)
    message = names(CONTROLNET, "blockwise ControlNet", "not supported", "not a component", "Qwen-Image")
    assert [found for found, _ in refuse(*named(CONTROLNET), *FOLLOW)[1]] == [message]


def test_images_to_edit_beside_one_to_follow(refuse, write, pairs):
    write()
    both = ("--extra_inputs", "controlnet_image,edit_image", "--data_file_keys", "image,controlnet_image,edit_image")
    message = names("extra_inputs", "edit_image", "Qwen-Image with a ControlNet")
    assert refuse(*named(CONTROLNET), *both) == (2, [(message, "it takes controlnet_image")])


def test_several_images_to_follow(refuse, write, pairs):
    write()
    rows = [{"image": "chelsea.png", "prompt": "a cat", "controlnet_image": ["coffee.png", "rocket.png"]}]
    (pairs / "metadata.json").write_text(json.dumps(rows))
    message = names(f"{pairs}/metadata.json", "row 1", "controlnet_image", "2 files")
    assert refuse(*named(CONTROLNET), *FOLLOW) == (1, [(message, names("write one row"))])


@pytest.mark.parametrize(
    ("typed", "message", "hint"),
    [
        (
            "dit.transformer_blocks.0.atn",
            names("trainable_models", "dit", "no module", "transformer_blocks.0.atn"),
            names("dit.transformer_blocks.0.attn"),
        ),
        (
            "dit.pos_embed",
            names("trainable_models", "dit", "no module", "pos_embed"),
            names("img_in", "time_text_embed", "transformer_blocks", "txt_in", "txt_norm", "2 more"),
        ),
        ("vae.decoder", names("trainable_models", "vae.decoder", "no gradient"), "remove it"),
        (
            "text_encoder.model.visual",
            names("trainable_models", "text_encoder.model.visual", "no gradient"),
            "remove it",
        ),
        (
            "text_encodr.model.norm",
            names("trainable_models", "text_encodr", "not a component", "Qwen-Image"),
            names("text_encoder"),
        ),
    ],
)
def test_modules_that_cannot_be_trained(refuse, typed, message, hint):
    assert refuse("--trainable_models", typed) == (2, [(message, hint)])


def test_modules_by_the_names_of_the_model_in_memory(refuse, tmp_path, models):
    """The documented names of FLUX.1 differ from module keys."""
    model_id = "black-forest-labs/FLUX.1-dev"
    places = {
        "dit": "flux1-dev.safetensors",
        "text_encoder_1": "text_encoder/model.safetensors",
        "text_encoder_2": "text_encoder_2/*.safetensors",
        "vae": "ae.safetensors",
    }
    for component, place in places.items():
        tiny_flux.write_tiny_weights(models, component, model_id, place)
    message = names("trainable_models", "dit", "no module", "transformer_blocks.0.attn")
    hint = names("dit.blocks.0.attn")
    arguments = ("--trainable_models", "dit.transformer_blocks.0.attn")
    assert refuse(*arguments, recipe="flux.1-dev-full") == (2, [(message, hint)])


def test_all_of_it_comes_in_one_report(refuse, write, models, dataset):
    write(heads=4)
    shutil.rmtree(models / "Qwen/Qwen-Image/vae")
    Image.new("RGB", (8, 8)).save(dataset / "small.png")
    arguments = ("--trainable_models", "dit.nothing,controlnet.controlnet_blocks.7", *named(CONTROLNET))
    code, problems = refuse(*arguments, "--extra_inputs", "controlnet_image")
    assert code == 2 and len(problems) == 6

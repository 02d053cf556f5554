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
    message = "no controlnet weights (ControlNet) given for Qwen-Image with a ControlNet"
    assert refuse(*FOLLOW) == (2, [(message, "add them to `--model_paths` or `--model_id_with_origin_paths`")])


def test_a_controlnet_without_an_image_to_follow(refuse, write):
    write()
    message = f"`{CONTROLNET}` is the controlnet of Qwen-Image, but `controlnet_image` is not in `extra_inputs`"
    hint = "pass `--extra_inputs controlnet_image`, or remove its files"
    assert refuse(*named(CONTROLNET)) == (2, [(message, hint)])


@pytest.mark.parametrize("typed", ["controlnet", "controlnet.controlnet_blocks"])
def test_a_controlnet_is_to_be_trained_that_nobody_asked_for(refuse, typed):
    message = "`trainable_models` names `controlnet`, which Qwen-Image does not have"
    hint = "remove it, or pass `--extra_inputs controlnet_image` and its files"
    assert refuse("--trainable_models", typed) == (2, [(message, hint)])


def test_the_column_and_its_key_are_missed(refuse, write, dataset):
    write()
    code, problems = refuse(*named(CONTROLNET), "--extra_inputs", "controlnet_image")
    assert code == 2 and problems == [
        (
            "`data_file_keys` does not include `controlnet_image`, whose files this run reads",
            "pass `--data_file_keys image,video,controlnet_image`",
        ),
        (
            f"`{dataset}/metadata.csv` has no column `controlnet_image`; it has `image`, `prompt`",
            "add the column",
        ),
    ]


def test_the_controlnet_of_another_width(refuse, write, pairs):
    write(heads=4)
    message = f"the controlnet from `{CONTROLNET}` makes states with 64 channels, but the dit of Qwen-Image with a ControlNet expects 32"
    assert refuse(*named(CONTROLNET), *FOLLOW) == (2, [(message, "use the controlnet of the same model")])


def test_the_controlnet_of_other_texts(refuse, write, pairs):
    write(text_width=128)
    message = (
        f"the controlnet from `{CONTROLNET}` takes text states with 128 channels, "
        "but the dit of Qwen-Image with a ControlNet expects 64"
    )
    assert refuse(*named(CONTROLNET), *FOLLOW) == (2, [(message, "use the controlnet of the same model")])


def test_a_controlnet_for_inpainting(refuse, write, pairs):
    path = write()
    tensors = load_file(path)
    width = len(tensors["controlnet_x_embedder.weight"])
    tensors["controlnet_x_embedder.weight"] = torch.zeros(width, 68, dtype=torch.bfloat16)
    save_file(tensors, path)
    config = json.loads((path.parent / "config.json").read_text()) | {"extra_condition_channels": 4}
    (path.parent / "config.json").write_text(json.dumps(config))
    message = f"the controlnet from `{CONTROLNET}` takes patches with 68 channels, but the dit of Qwen-Image with a ControlNet expects 64"
    hint = "use a ControlNet with only a control image, not one for inpainting"
    assert refuse(*named(CONTROLNET), *FOLLOW) == (2, [(message, hint)])


def test_the_controlnet_of_another_family(refuse, write, pairs):
    write(tiny_flux)
    message = f"`{CONTROLNET}` is a FLUX.1 ControlNet, not a component of Qwen-Image"
    hint = "pass files of its components: dit, text_encoder, vae, controlnet"
    assert refuse(*named(CONTROLNET), *FOLLOW) == (2, [(message, hint)])


def test_a_controlnet_that_is_not_supported(refuse, write, pairs):
    path = write()
    extra = {f"controlnet_blocks.0.{name}_rms.weight": torch.zeros(2) for name in "xy"}
    save_file(load_file(path) | extra, path)
    message = f"`{CONTROLNET}` is a blockwise ControlNet, which is not supported yet, not a component of Qwen-Image"
    assert [found for found, _ in refuse(*named(CONTROLNET), *FOLLOW)[1]] == [message]


def test_images_to_edit_beside_one_to_follow(refuse, write, pairs):
    write()
    both = ("--extra_inputs", "controlnet_image,edit_image", "--data_file_keys", "image,controlnet_image,edit_image")
    message = "`extra_inputs` names `edit_image`, which Qwen-Image with a ControlNet does not support"
    assert refuse(*named(CONTROLNET), *both) == (2, [(message, "it takes controlnet_image")])


def test_several_images_to_follow(refuse, write, pairs):
    write()
    rows = [{"image": "chelsea.png", "prompt": "a cat", "controlnet_image": ["coffee.png", "rocket.png"]}]
    (pairs / "metadata.json").write_text(json.dumps(rows))
    message = f"`{pairs}/metadata.json` row 1: column `controlnet_image` lists 2 files, expected one"
    assert refuse(*named(CONTROLNET), *FOLLOW) == (1, [(message, "write one row per file")])


@pytest.mark.parametrize(
    ("typed", "message", "hint"),
    [
        (
            "dit.transformer_blocks.0.atn",
            "`trainable_models`: dit has no module `transformer_blocks.0.atn` with weights",
            "did you mean `dit.transformer_blocks.0.attn`?",
        ),
        (
            "dit.pos_embed",
            "`trainable_models`: dit has no module `pos_embed` with weights",
            "its modules are `img_in`, `time_text_embed`, `transformer_blocks`, `txt_in`, `txt_norm` and 2 more",
        ),
        (
            "vae.decoder",
            "`trainable_models` names `vae.decoder`, which receives no gradient in this setup",
            "remove it",
        ),
        (
            "text_encoder.model.visual",
            "`trainable_models` names `text_encoder.model.visual`, which receives no gradient in this setup",
            "remove it",
        ),
        (
            "text_encodr.model.norm",
            "`trainable_models` names `text_encodr`, which is not a component of Qwen-Image",
            "did you mean `text_encoder`?",
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
    message = "`trainable_models`: dit has no module `transformer_blocks.0.attn` with weights"
    hint = "in the documented names this is `dit.blocks.0.attn`"
    arguments = ("--trainable_models", "dit.transformer_blocks.0.attn")
    assert refuse(*arguments, recipe="flux.1-dev-full") == (2, [(message, hint)])


def test_all_of_it_comes_in_one_report(refuse, write, models, dataset):
    write(heads=4)
    shutil.rmtree(models / "Qwen/Qwen-Image/vae")
    Image.new("RGB", (8, 8)).save(dataset / "small.png")
    arguments = ("--trainable_models", "dit.nothing,controlnet.controlnet_blocks.7", *named(CONTROLNET))
    code, problems = refuse(*arguments, "--extra_inputs", "controlnet_image")
    assert code == 2 and len(problems) == 6

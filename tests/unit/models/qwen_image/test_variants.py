"""The editing model of a run, its inputs, and the sizes at which it reads images."""

import pytest

from diffsynth_core.models.qwen_image.spec import QWEN_IMAGE
from diffsynth_core.models.qwen_image.variants import edit_model, edit_size, prompt_size, vae_size
from diffsynth_core.models.spec import is_below

MILLION = 1024 * 1024
SHARDS = "diffusion_pytorch_model*.safetensors"


@pytest.mark.parametrize(
    ("origin", "model_id"),
    [
        (f"Qwen/Qwen-Image-Edit:transformer/{SHARDS}", "Qwen/Qwen-Image-Edit"),
        ("/models/Qwen-Image-Edit/transformer/model-00001-of-00009.safetensors", "Qwen/Qwen-Image-Edit"),
        ("Qwen-Image-Edit/transformer/a.safetensors, Qwen-Image-Edit/b.safetensors", "Qwen/Qwen-Image-Edit"),
        ("D:\\models\\Qwen-Image-Edit\\transformer\\*.safetensors", "Qwen/Qwen-Image-Edit"),
        ("/hub/models--Qwen--Qwen-Image-Edit/snapshots/2509ab/transformer/x.safetensors", "Qwen/Qwen-Image-Edit"),
        (f"Qwen/Qwen-Image-Edit-2509:transformer/{SHARDS}", "Qwen/Qwen-Image-Edit-2509"),
        (f"Qwen/Qwen-Image-Edit-2511:transformer/{SHARDS}", "Qwen/Qwen-Image-Edit-2511"),
        ("/mine/qwen-edit-2511/model.safetensors", "Qwen/Qwen-Image-Edit-2511"),
        ("/models/Qwen-Image-Edit/my-2509/model.safetensors", "Qwen/Qwen-Image-Edit-2509"),
        ("/models/Qwen-Image-Edit/run-25091/model.safetensors", "Qwen/Qwen-Image-Edit"),
        (f"FireRedTeam/FireRed-Image-Edit-1.0:transformer/{SHARDS}", "FireRedTeam/FireRed-Image-Edit-1.0"),
        (f"FireRedTeam/FireRed-Image-Edit-1.1:transformer/{SHARDS}", "FireRedTeam/FireRed-Image-Edit-1.1"),
        ("/models/Qwen-Image-Edit-mine/model.safetensors", "Qwen/Qwen-Image-Edit-2509"),
        (f"Qwen/Qwen-Image:transformer/{SHARDS}", "Qwen/Qwen-Image-Edit-2509"),
        ("", "Qwen/Qwen-Image-Edit-2509"),
    ],
)
def test_the_model_is_told_by_the_name_of_its_files(origin, model_id):
    """The first Edit model is recognized only by a folder or repository with exactly its name."""
    found = edit_model(origin)
    assert found.model_id == model_id
    assert found.one_image == (model_id == "Qwen/Qwen-Image-Edit")
    guessed = not any(
        name in origin for name in ("250", "251", "FireRed", "Qwen-Image-Edit:", "Qwen-Image-Edit/", "Edit\\")
    )
    assert found.guessed == guessed
    name = model_id.partition("/")[2]
    assert found.title == (
        f"Qwen-Image, shown images as {name} (the name of its files tells no kind)" if guessed else name
    )


def test_without_images_to_edit_every_model_makes_images_from_text():
    variants = {QWEN_IMAGE.variant({}, (), f"Qwen/Qwen-Image{name}:x").model_id for name in ("", "-Edit", "-Edit-2511")}
    assert variants == {"Qwen/Qwen-Image"}
    found = QWEN_IMAGE.variant({}, (), "")
    assert (found.accepted_inputs, found.required_inputs, found.conditions, dict(found.extra_trainable)) == (
        ("edit_image", "controlnet_image"),
        (),
        (),
        {},
    )


def test_the_first_model_is_shown_one_image_at_one_size():
    found = QWEN_IMAGE.variant({}, ("edit_image",), "Qwen/Qwen-Image-Edit:transformer/x")
    assert found.title == "Qwen-Image-Edit"
    (shown,) = found.conditions
    assert (shown.name, shown.column, shown.factor, shown.max_count) == ("edit_image", "edit_image", 1, 1)
    assert shown.size is vae_size
    assert {encoder.name: encoder.columns for encoder in found.encoders} == {
        "edit_text": ("prompt", "edit_image"),
        "latents": ("image",),
        "edit_latents": ("edit_image",),
    }


@pytest.mark.parametrize(
    "origin", ["Qwen/Qwen-Image-Edit-2509:x", "FireRedTeam/FireRed-Image-Edit-1.1:x", "mine.safetensors"]
)
def test_the_later_models_are_shown_any_number_at_two_sizes(origin):
    found = QWEN_IMAGE.variant({}, ("edit_image",), origin)
    assert [(one.name, one.column, one.factor, one.max_count, one.size) for one in found.conditions] == [
        ("edit_image", "edit_image", 1, None, vae_size),
        ("edit_image_small", "edit_image", 1, None, prompt_size),
    ]
    assert {encoder.name: encoder.columns for encoder in found.encoders} == {
        "edit_plus_text": ("prompt", "edit_image_small"),
        "latents": ("image",),
        "edit_latents": ("edit_image",),
    }


@pytest.mark.parametrize("origin", ["Qwen/Qwen-Image-Edit:x", "Qwen/Qwen-Image-Edit-2511:x"])
def test_editing_reaches_the_image_half_of_the_text_encoder_alone(origin):
    found = QWEN_IMAGE.variant({}, ("edit_image",), origin)
    unused = QWEN_IMAGE.component("text_encoder").unused_params(frozenset())
    assert {name for name in unused if not is_below(name, found.extra_trainable["text_encoder"])} == {"lm_head"}


@pytest.mark.parametrize(
    ("width", "height", "vae", "prompt"),
    [
        (1024, 1024, (1024, 1024), (384, 384)),
        (64, 64, (1024, 1024), (384, 384)),  # small images are enlarged
        (4000, 4000, (1024, 1024), (384, 384)),
        (600, 400, (832, 1248), (320, 480)),
        (400, 600, (1248, 832), (480, 320)),
        (1920, 1080, (768, 1376), (288, 512)),
    ],
)
def test_published_sizes(width, height, vae, prompt):
    assert vae_size(width, height, MILLION) == vae_size(width, height, 9 * MILLION) == vae
    assert prompt_size(width, height, MILLION) == prompt_size(width, height, 9 * MILLION) == prompt


@pytest.mark.parametrize(
    ("max_pixels", "vae", "prompt"),
    [(MILLION, (832, 1248), (320, 480)), (MILLION // 4, (416, 640), (160, 224)), (MILLION // 64, (96, 160), (32, 64))],
)
def test_smaller_areas_make_both_sizes_smaller(max_pixels, vae, prompt):
    assert vae_size(600, 400, max_pixels) == vae
    assert prompt_size(600, 400, max_pixels) == prompt


def test_no_side_vanishes():
    assert edit_size(16 / 1, 32 * 32) == (32, 128)
    assert prompt_size(30, 1, 256) == (32, 32)


@pytest.mark.parametrize(("width", "height"), [(300, 1), (1, 300), (20000, 90)])
def test_images_too_narrow_for_the_image_processor_have_no_size(width, height):
    assert vae_size(width, height, MILLION) == (0, 0)


def test_the_processor_is_looked_for_with_images_to_edit_only():
    processor = QWEN_IMAGE.tokenizers["processor_path"]
    assert (processor.inputs, processor.what, processor.component) == (("edit_image",), "processor", "text_encoder")
    assert QWEN_IMAGE.tokenizers["tokenizer_path"].inputs == ()

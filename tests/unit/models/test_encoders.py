"""Encoders: what variants declare without torch, and the functions that do it."""

import inspect
from dataclasses import replace

import pytest

from diffsynth_core.models.registry import FAMILIES, load_family

EDIT = "Qwen/Qwen-Image-Edit"
I2V = {"dit": {"patch_embedding.weight": (1, 36), "proj_out.weight": (64, 1)}}
CLIP = {"image_encoder": {}}
TI2V = {"dit": {"patch_embedding.weight": (1, 48), "proj_out.weight": (192, 1)}}
VARIANTS = [
    ("qwen-image", {}, (), ""),
    ("qwen-image", {}, ("edit_image",), EDIT),
    ("qwen-image", {}, ("edit_image",), f"{EDIT}-2509"),
    ("qwen-image", {}, ("controlnet_image",), ""),
    ("flux", {}, (), ""),
    ("flux", {}, ("kontext_images",), ""),
    ("flux", {}, ("controlnet_image",), ""),
    ("flux2", {}, (), ""),
    ("flux2", {}, ("edit_image",), ""),
    ("wan", {}, (), ""),
    ("wan", I2V, ("input_image", "end_image"), ""),
    ("wan", CLIP, ("input_image",), ""),
    ("wan", TI2V, (), ""),
    ("wan", TI2V, ("input_image",), ""),
]


def encoders_of(family, shapes, inputs, origin):
    return FAMILIES[family].variant(shapes, inputs, origin).encoders


@pytest.mark.parametrize("family", FAMILIES)
def test_every_declared_encoder_has_its_function_and_every_function_is_declared(family):
    declared = {encoder.name for known, *of in VARIANTS if known == family for encoder in encoders_of(known, *of)}
    assert load_family(family).encoders.keys() == declared


@pytest.mark.parametrize(("family", "shapes", "inputs", "origin"), VARIANTS)
def test_functions_take_the_columns_that_their_facts_declare(family, shapes, inputs, origin):
    for encoder in encoders_of(family, shapes, inputs, origin):
        _, _, *columns = inspect.signature(load_family(family).encoders[encoder.name].encode).parameters
        assert len(columns) == len(encoder.columns), encoder.name


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_without_a_function_is_an_error_and_not_the_encoder_of_the_target(family):
    *_, encoder = FAMILIES[family].variant({}, (), "").encoders
    unknown = replace(encoder, name="nobody")
    with pytest.raises(KeyError, match="nobody"):
        load_family(family).encode(unknown, {}, dict.fromkeys(encoder.columns))

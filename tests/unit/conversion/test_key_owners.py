"""Ownership of a checkpoint's keys, with and without prefixes, metadata and records."""

import pytest

from diffsynth_core.conversion.key_owners import Origin, find_owners, misnamed
from diffsynth_core.conversion.translation import find_reading
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.flux import keys as flux
from diffsynth_core.models.registry import FAMILIES

LORA = "transformer_blocks.0.attn.to_q.lora_A.default.weight"


def signature(family, component, layout=0):
    return sorted(FAMILIES[family].component(component).layouts[layout].signature)


@pytest.mark.parametrize(
    ("key", "origin", "component", "name"),
    [
        ("pipe.vae.conv1.weight", Origin(), "vae", "conv1.weight"),
        ("vae.conv1.weight", Origin(), "vae", "conv1.weight"),
        ("pipe.controlnet.models.0.x.weight", Origin(), "controlnet", "x.weight"),
        ("pipe.dit2.blocks.0.weight", Origin(), "dit2", "blocks.0.weight"),
        ("pipe.motion_controller.x", Origin(), "motion_controller", "x"),
        ("x.weight", Origin(removed_prefix="pipe.vae."), "vae", "x.weight"),
        ("blocks.0.weight", Origin(removed_prefix="pipe.dit.transformer_"), "dit", "transformer_blocks.0.weight"),
        ("x.weight", Origin(default_component="controlnet"), "controlnet", "x.weight"),
        ("transformer.a.lora_A.weight", Origin(), "dit", "transformer.a.lora_A.weight"),
        ("lora_unet_a_b.alpha", Origin(lora_component="dit2"), "dit2", "lora_unet_a_b.alpha"),
    ],
)
def test_one_key(key, origin, component, name):
    found = find_owners([key], origin)
    assert {**found.full, **found.lora} == {component: {name: key}}
    assert not found.unmatched


def test_what_fits_several_stays_unmatched():
    found = find_owners([LORA], Origin())
    assert (found.unmatched, found.fits) == ((LORA,), ("dit", "controlnet"))
    found = find_owners([LORA, "pipe.controlnet.x.weight"], Origin())
    assert list(found.lora) == ["dit"] and not found.unmatched


def test_a_tensor_that_stands_there_twice():
    with pytest.raises(DiffSynthError, match=r"1 duplicate tensor: `pipe\.vae\.x\.weight`, `vae\.x\.weight`"):
        find_owners(["pipe.vae.x.weight", "vae.x.weight"], Origin())


def test_the_user_may_not_contradict_the_checkpoint():
    with pytest.raises(DiffSynthError, match="without a prefix to `dit`, but `--unprefixed` is `vae`"):
        find_owners(["x.weight"], Origin(removed_prefix="pipe.dit.", default_component="vae"))


def test_names_of_another_component_are_told():
    (problem,) = misnamed({"vae": sorted(flux.T5_SIGNATURE)}, FAMILIES["flux"])
    assert problem.message.startswith("the tensors under `vae` belong to `text_encoder_2`: ")
    assert misnamed({"dit2": signature("wan", "dit")}, FAMILIES["wan"]) == []


@pytest.mark.parametrize(
    ("family", "component", "name", "ours"),
    [
        (
            "qwen-image",
            "text_encoder",
            "model.layers.0.mlp.up_proj.weight",
            "model.language_model.layers.0.mlp.up_proj",
        ),
        ("qwen-image", "text_encoder", "model.language_model.norm.weight", "model.language_model.norm"),
        ("flux", "dit", "double_blocks.0.img_mlp.0.weight", "transformer_blocks.0.ff.net.0.proj"),
        ("flux", "dit", "blocks.0.ff_a.0.weight", "transformer_blocks.0.ff.net.0.proj"),
        ("flux", "dit", "transformer_blocks.0.ff.net.2.weight", "transformer_blocks.0.ff.net.2"),
        ("flux", "text_encoder_1", "text_model.final_layer_norm.weight", "final_layer_norm"),
        ("wan", "dit", "blocks.0.ffn.0.weight", "blocks.0.ffn.net.0.proj"),
        ("wan", "dit", "blocks.0.ffn.net.2.weight", "blocks.0.ffn.net.2"),
        (
            "wan",
            "vae",
            "encoder.downsamples.0.downsamples.1.residual.2.weight",
            "encoder.down_blocks.0.resnets.1.conv1",
        ),
    ],
)
def test_parts_of_components_are_read_by_the_map_that_knows_them(family, component, name, ours):
    reading, _ = find_reading(FAMILIES[family].component(component), [name])
    assert reading.to_targets(name) == (f"{ours}.weight",)

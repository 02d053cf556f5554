"""Recognition of families and components by the names of their tensors."""

import pytest

from diffsynth_core.models.recognition import components_that_fit, family_of_components
from diffsynth_core.models.registry import FAMILIES

LORA = "transformer_blocks.0.attn.to_q.lora_A.default.weight"


def signature(family, component, layout=0):
    return sorted(FAMILIES[family].component(component).layouts[layout].signature)


@pytest.mark.parametrize("family", FAMILIES)
def test_signatures_tell_components(family):
    """Every layout of every component is recognized by names alone, without the family."""
    for component in FAMILIES[family].components:
        for layout in component.layouts:
            assert component.name in components_that_fit(layout.signature)
            assert components_that_fit(layout.signature, FAMILIES[family]) == (component.name,)


@pytest.mark.parametrize(
    ("keys", "taken", "fits"),
    [
        ([LORA], (), ("dit", "controlnet")),
        ([LORA], ("controlnet",), ("dit",)),
        (["blocks.0.self_attn.q.lora_A.default.weight"], (), ("dit",)),
        (["blocks.3.attn.a_to_qkv.lora_A.default.weight"], (), ("dit",)),
        (["double_blocks.0.img_mlp.0.weight"], (), ("dit",)),
        (["blocks.0.attn.q.weight", "blocks.0.ffn.fc1.weight"], (), ("text_encoder",)),
        (["nobody.knows.weight"], (), ()),
    ],
)
def test_parts_fit_what_they_can_be_of(keys, taken, fits):
    assert components_that_fit(keys, taken=taken) == fits


def test_families_are_told_by_whole_components():
    assert family_of_components({"dit": signature("flux", "dit")}) is FAMILIES["flux"]
    assert family_of_components({"dit": signature("wan", "dit"), "vae": signature("wan", "vae", 1)}) is FAMILIES["wan"]
    assert family_of_components({"dit": signature("wan", "dit"), "vae": signature("flux", "vae")}) is None
    assert family_of_components({"dit": ["x"]}) is None
    assert family_of_components({}) is None

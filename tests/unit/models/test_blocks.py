"""Lists of repeated blocks and weights in float32: what families declare, and what the modules have."""

import pytest
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from diffsynth_core.models.blocks import linear_layers_of_blocks
from diffsynth_core.models.registry import FAMILIES, load_family

PUBLISHED = [(facts, known) for facts in FAMILIES.values() for known in facts.published if known.config is not None]
BLOCKS = [(facts, known) for facts, known in PUBLISHED if facts.component(known.component).blocks]


def build(facts, known, **options):
    with init_empty_weights(include_buffers=False):
        return load_family(facts.name).build(known.component, {**known.config, **options})


def name_of(value):
    return getattr(value, "name", None) or f"{value.component} {value.files}"


@pytest.mark.parametrize(("facts", "known"), BLOCKS, ids=name_of)
def test_the_declared_lists_are_those_of_the_module_and_their_options_set_their_lengths(facts, known):
    declared = facts.component(known.component).blocks
    lengths = {option: 3 + number for number, option in enumerate(sorted(set(declared.values())))}
    module = build(facts, known, **lengths)
    found = {name: len(child) for name, child in module.named_children() if isinstance(child, nn.ModuleList)}
    assert found == {name: lengths[option] for name, option in declared.items()}
    assert {name.partition(".")[0] for name in linear_layers_of_blocks(module)} <= declared.keys()


def test_every_denoiser_and_controlnet_declares_its_lists():
    declared = {(facts.name, known.component) for facts, known in BLOCKS}
    assert declared == {
        (facts.name, known.component) for facts, known in PUBLISHED if known.component in ("dit", "controlnet")
    }


@pytest.mark.parametrize(("facts", "known"), PUBLISHED, ids=name_of)
def test_what_stays_float32_is_what_diffusers_keeps_so(facts, known):
    module = build(facts, known)
    kept = module._keep_in_fp32_modules if isinstance(module, ModelMixin) else None
    assert facts.component(known.component).fp32_modules == frozenset(kept or ())

"""The published sizes that stand in for files that are not there, against the model classes."""

import math

import pytest
from accelerate import init_empty_weights

from diffsynth_core.models.registry import FAMILIES, load_family
from diffsynth_core.models.size_facts import HubModelSize

SHAPED = [(name, known) for name, facts in FAMILIES.items() for known in facts.published if known.shapes()]
BLOCKS = {"blocks": 2, "single_blocks": 2}


def few_blocks(known: HubModelSize) -> dict[str, tuple[int, ...]]:
    """The tensors of the same model with two blocks of each kind: the others are alike."""
    function, keywords = known.shapes.func, known.shapes.keywords
    return dict(function(**{**keywords, **{name: count for name, count in BLOCKS.items() if name in keywords}}))


@pytest.mark.parametrize(("family", "known"), SHAPED)
def test_published_shapes_are_those_of_the_module(family, known):
    from importlib import import_module

    shapes = few_blocks(known)
    components = import_module(f"{load_family(family).__module__.rpartition('.')[0]}.components")
    with init_empty_weights(include_buffers=False):
        module = components.build("dit", components.infer_transformer(shapes))
    assert {name: tuple(weight.shape) for name, weight in module.named_parameters()} == shapes


@pytest.mark.parametrize(("family", "known"), SHAPED)
def test_published_shapes_are_as_many_numbers_as_are_published(family, known):
    assert sum(map(math.prod, known.shapes().values())) == known.parameters


@pytest.mark.parametrize("facts", FAMILIES.values(), ids=lambda facts: facts.name)
def test_a_denoiser_of_every_recipe_has_published_shapes(facts):
    assert {known.component for known in facts.published} >= {"dit", "vae"}

"""The published sizes that stand in for files that are not there, against the model classes."""

import math
from importlib.resources import files

import pytest

from diffsynth_core.models.hub_shapes import FILE, hub_shapes, record
from diffsynth_core.models.registry import FAMILIES

CONFIGURED = [(facts, known) for facts in FAMILIES.values() for known in facts.published if known.config is not None]
OUTSIDE_OF_THE_MODULE = {"image_encoder": 1280 * 1024 + 1}
"""Numbers in the files that no module here has: CLIP's projection and its temperature."""


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")
def test_recorded_shapes_are_those_of_the_modules():
    """Run `python -m diffsynth_core.models.hub_shapes` where a library or a configuration changed."""
    assert (files("diffsynth_core.models") / FILE).read_text(encoding="utf-8") == record()


@pytest.mark.parametrize(("facts", "known"), CONFIGURED, ids=lambda value: getattr(value, "name", value.component))
def test_recorded_shapes_are_as_many_numbers_as_are_published(facts, known):
    numbers = sum(map(math.prod, hub_shapes(facts, known).values()))
    assert numbers + OUTSIDE_OF_THE_MODULE.get(known.component, 0) == known.parameters


@pytest.mark.parametrize("facts", FAMILIES.values(), ids=lambda facts: facts.name)
def test_every_published_component_has_a_configuration(facts):
    assert {known.component for known in facts.published} >= {"dit", "vae"}
    assert all(known.config is not None for known in facts.published)

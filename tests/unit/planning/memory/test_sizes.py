"""Sizes of what a run works with."""

import pytest

from diffsynth_core.models.size_facts import StepSizes
from diffsynth_core.models.token_counts import estimate_tokens
from diffsynth_core.planning.memory.sizes import shrink


def test_images_shrink_to_a_share_of_their_area():
    sizes = StepSizes(2, ((1, 1024, 768), (1, 512, 512)), 77)
    assert shrink(sizes, 0.25, 16).images == ((1, 512, 384), (1, 256, 256))
    assert shrink(sizes, 0.000001, 16).images == ((1, 16, 16), (1, 16, 16))


@pytest.mark.parametrize(("caption", "tokens"), [("", 0), ("a cat", 2), ("一只猫", 3), ("a 猫", 2)])
def test_tokens_of_a_caption_are_told_by_its_letters(caption, tokens):
    assert estimate_tokens(caption) == tokens

"""Which blocks wait in host memory, and in which pieces."""

from itertools import pairwise

import pytest

from diffsynth_core.models.block_swap import SPLIT_NUMBERS, choose_blocks, frozen_blocks, swap_units
from diffsynth_core.models.shapes import repeat_block
from diffsynth_core.models.spec import ComponentFacts, Layout

LAYERS = {"attn.to_q.weight": (64, 32), "ff.up.weight": (128, 64), "ff.down.weight": (64, 128)}
OTHERS = {"attn.to_q.bias": (64,), "norm.weight": (64,), "table": (1, 6, 64), "mod.lin.weight": (384, 64)}
SHAPES = {
    "x_embedder.weight": (64, 16),
    **repeat_block("double", 3, LAYERS | OTHERS),
    **repeat_block("single", 4, LAYERS),
    "proj_out.weight": (16, 64),
}
FACTS = ComponentFacts(
    "dit", "DiT", (Layout(frozenset()),), (), blocks={"double": "a", "single": "b"}, fp32_modules=frozenset({"mod"})
)
NAMES = tuple(f"double.{index}" for index in range(3)) + tuple(f"single.{index}" for index in range(4))


def test_blocks_are_named_in_the_order_of_the_forward_pass():
    assert frozen_blocks(FACTS, SHAPES, ()) == NAMES


def test_a_block_in_which_a_weight_trains_is_none_of_them():
    trained = ("double.1.norm.weight", "single.3.ff.up.weight", "x_embedder.weight")
    assert frozen_blocks(FACTS, SHAPES, trained) == tuple(
        name for name in NAMES if name not in ("double.1", "single.3")
    )
    assert frozen_blocks(FACTS, SHAPES, SHAPES) == ()


@pytest.mark.parametrize("count", [1, 2, 7, 38, 60])
def test_chosen_blocks_are_different_and_spread(count):
    blocks = [str(index) for index in range(count)]
    for number in range(1, count + 1):
        chosen = [int(block) for block in choose_blocks(blocks, number)]
        assert len(chosen) == number and chosen == sorted(set(chosen)) and chosen[-1] < count
        gaps = {after - before for before, after in pairwise(chosen)}
        assert not gaps or max(gaps) - min(gaps) <= 1
    assert choose_blocks(blocks, 0) == ()


def test_linear_layers_of_a_block_are_copied_together_without_those_in_float32():
    assert swap_units(FACTS, SHAPES, ("double.2", "single.0"), None) == (
        ("double.2.attn.to_q", "double.2.ff.up", "double.2.ff.down"),
        ("single.0.attn.to_q", "single.0.ff.up", "single.0.ff.down"),
    )


@pytest.mark.parametrize(
    ("numbers", "units"),
    [
        (64 * 32 + 2 * 64 * 128, ["attn.to_q ff.up ff.down"]),
        (64 * 32 + 2 * 64 * 128 - 1, ["attn.to_q", "ff.up ff.down"]),
        (2 * 64 * 128 - 1, ["attn.to_q", "ff.up", "ff.down"]),
        (0, ["attn.to_q", "ff.up", "ff.down"]),
    ],
)
def test_larger_blocks_are_split_into_their_parts(numbers, units):
    found = swap_units(FACTS, SHAPES, ("single.1",), numbers / SPLIT_NUMBERS)
    assert found == tuple(tuple(f"single.1.{name}" for name in unit.split()) for unit in units)

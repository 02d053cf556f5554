"""What a tape counts: small forward passes, counted by hand."""

import pytest

from diffsynth_core.models.tape import Network, StepSizes, Tape
from diffsynth_core.models.token_counts import estimate_tokens
from diffsynth_core.planning.sizes import shrink

SHAPES = {"first.weight": (8, 4), "first.bias": (8,), "second.weight": (4, 8), "norm.weight": (4,)}
TOKENS = 10
BOTH = frozenset({"first.weight", "first.bias", "second.weight"})


def two_layers(tape: Tape) -> int:
    """A layer, an activation and a layer over ten tokens of four float32 numbers."""
    states = tape.given(1, TOKENS, 4, dtype=tape.network.dtype)
    tape.linear(tape.activation(tape.linear(states, "first")), "second")
    return tape.kept


def test_frozen_layers_keep_nothing_where_nothing_takes_gradients():
    assert two_layers(Tape(Network(SHAPES, "float32"))) == 0


def test_trained_layers_keep_what_they_read():
    # The input of the first layer, of the activation and of the second layer.
    assert two_layers(Tape(Network(SHAPES, "float32", BOTH, BOTH))) == 4 * TOKENS * (4 + 8 + 8)


def test_a_frozen_layer_behind_a_trained_one_keeps_its_weight_alone():
    trained = frozenset({"first.weight"})
    assert two_layers(Tape(Network(SHAPES, "float32", trained, trained))) == 4 * TOKENS * (4 + 8)


def test_autocast_keeps_casts_of_what_is_float32():
    tape = Tape(Network(SHAPES, "bfloat16", BOTH, BOTH), autocast="bfloat16")
    # Of the weights the second: the first layer's input takes no gradient.
    assert two_layers(tape) == 2 * TOKENS * (4 + 8 + 8) + 2 * 4 * 8


def test_a_lora_keeps_its_own_input_and_what_lies_between_its_halves():
    tape = Tape(Network(SHAPES, "float32", lora={"first": 3}))
    # The same input as the layer's, the three numbers between A and B, and the input of the activation behind it.
    assert two_layers(tape) == 4 * TOKENS * (4 + 3 + 8)


def test_under_autocast_every_lora_has_a_cast_of_its_input_of_its_own():
    def two_readers(autocast: str | None) -> int:
        tape = Tape(Network(SHAPES, "bfloat16" if autocast else "float32", lora={"first": 3}), autocast)
        states = tape.given(1, TOKENS, 4, dtype=tape.network.dtype)
        tape.linear(states, "first")
        one = tape.kept
        tape.linear(states, "first")
        return tape.kept - one

    assert two_readers(None) == 4 * TOKENS * 3
    assert two_readers("bfloat16") == 2 * TOKENS * (4 + 3)


def test_one_memory_counts_once():
    tape = Tape(Network(SHAPES, "float32", BOTH, BOTH))
    states = tape.given(1, TOKENS, 4)
    tape.linear(states, "first")
    tape.linear(tape.view(states, 1, TOKENS, 4), "first")
    assert tape.kept == 4 * TOKENS * 4


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputed_blocks_keep_their_inputs_and_one_block_is_there_at_a_time(recompute):
    tape = Tape(Network(SHAPES, "float32", BOTH, BOTH), recompute=recompute)
    states = tape.given(1, TOKENS, 4)
    for _ in range(3):
        with tape.block(states):
            states = tape.linear(tape.activation(tape.linear(states, "first")), "second")
    inner, inputs = 4 * TOKENS * (8 + 8), 4 * TOKENS * 4
    assert tape.kept == (3 * inputs if recompute else 3 * (inputs + inner))
    assert tape.largest_block == (inner if recompute else 0)


def test_norms_are_wide_under_autocast_on_gpus_alone():
    def kept(device: str) -> int:
        tape = Tape(Network(SHAPES, "bfloat16", BOTH, BOTH), "bfloat16", device)
        states = tape.linear(tape.given(1, TOKENS, 4, dtype="bfloat16"), "first")
        before = tape.kept
        tape.layer_norm(states)
        return tape.kept - before

    assert kept("cpu") == TOKENS * (2 * 8 + 2 * 4)
    assert kept("cuda") == TOKENS * (4 * 8 + 2 * 4)


@pytest.mark.parametrize(("made", "again"), [("bfloat16", 0), ("float32", 2 * TOKENS * 8)])
def test_what_attention_makes_is_cast_to_the_format_of_the_queries(made, again):
    """A layer behind it keeps a cast of its own where norms made the queries float32."""
    tape = Tape(Network(SHAPES, "bfloat16", BOTH, BOTH), "bfloat16")
    query, key, value = (tape.linear(tape.given(1, TOKENS, 4, dtype="bfloat16"), "first") for _ in range(3))
    joint = tape.attention(*(tape.cast(tape.view(part, 1, TOKENS, 2, 4), made) for part in (query, key)), value)
    assert joint.dtype == made
    before = tape.kept
    tape.linear(tape.view(joint, 1, TOKENS, 8), "second")
    assert tape.kept - before == again + 2 * 4 * 8


def test_images_shrink_to_a_share_of_their_area():
    sizes = StepSizes(2, ((1, 1024, 768), (1, 512, 512)), 77)
    assert shrink(sizes, 0.25, 16).images == ((1, 512, 384), (1, 256, 256))
    assert shrink(sizes, 0.000001, 16).images == ((1, 16, 16), (1, 16, 16))


@pytest.mark.parametrize(("caption", "tokens"), [("", 0), ("a cat", 2), ("一只猫", 3), ("a 猫", 2)])
def test_tokens_of_a_caption_are_told_by_its_letters(caption, tokens):
    assert estimate_tokens(caption) == tokens

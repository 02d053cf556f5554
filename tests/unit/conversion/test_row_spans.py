"""Tensors as byte ranges in files against the same tensors in memory: split, stacked, swapped and reshaped alike."""

import random
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth_core.conversion.row_spans import RowSpans, row_spans
from diffsynth_core.conversion.translation import translate
from diffsynth_core.models.flux.keys import DIT, DIT_ORIGINAL
from diffsynth_core.progress import SilentReporter
from diffsynth_core.weights.dtypes import BITS_PER_ELEMENT
from diffsynth_core.weights.key_maps import SAME_NAMES, TableMap
from diffsynth_core.weights.weight_sets import Span, open_weights
from diffsynth_core.weights.weight_writer import OutputFile, write_outputs

NAMES = TableMap(
    {"plain.{}": "renamed.{}"},
    fused={"qkv": ("q", "k", "v"), "wide": (("a", 1), ("b", 4))},
    unsqueezed={"position": ("embedding", 2)},
    swap_halves={"modulation": "norm"},
    pointwise={"convolution": "linear"},
    ignored=("second",),
)
THEIRS = {
    "plain.3.weight": (2, 3),
    "plain.3.bias": (2,),
    "qkv.weight": (6, 4),
    "qkv.bias": (6,),
    "wide.weight": (10, 3),
    "position": (1, 1, 5, 2),
    "modulation.weight": (4, 3),
    "convolution.weight": (3, 2, 1, 1),
}


def write(folder, tensors, outputs):
    """Return the bytes that the planned spans of a file give when written."""
    place = folder / "out.safetensors"
    write_outputs(
        [OutputFile(place, tuple(tensor.output(name) for name, tensor in outputs.items()))], [], SilentReporter(), True
    )
    return load_file(place)


@pytest.mark.parametrize("seed", range(3))
def test_places_are_what_tensors_are(tmp_path, seed):
    """From sources to targets and back, for shuffled tensors of one dtype."""
    generator, dtype = torch.Generator().manual_seed(seed), (torch.float32, torch.bfloat16, torch.int8)[seed]
    tensors = {
        name: torch.randint(-99, 99, shape, generator=generator).to(dtype)
        for name, shape in random.Random(seed).sample(sorted(THEIRS.items()), len(THEIRS))
    }
    save_file(tensors, tmp_path / "theirs.safetensors")
    weights = open_weights([tmp_path / "theirs.safetensors"])
    places = {name: row_spans(weights, name) for name in tensors}
    cut = translate(places, NAMES, SAME_NAMES)
    assert (cut.unknown, cut.misshapen, cut.unneeded) == ((), (), ())
    expected = {key: part for name in tensors for key, part in NAMES.split(name, tensors[name]).items()}
    ours = write(tmp_path, tensors, cut.tensors)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    joined = translate(cut.tensors, SAME_NAMES, NAMES)
    assert (joined.unknown, joined.misshapen, joined.unneeded) == ((), (), ())
    back = write(tmp_path, tensors, joined.tensors)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in back)


def place(shape, dtype="F32"):
    """A tensor at a random offset of a file."""
    return RowSpans(shape, dtype, [Span(Path("x"), 0, prod(shape) * BITS_PER_ELEMENT[dtype] // 8)])


@pytest.mark.parametrize(
    ("tensors", "unknown", "misshapen"),
    [
        ({"q.weight": place((2, 3)), "k.weight": place((2, 3))}, {"q.weight", "k.weight"}, set()),
        (
            {f"{part}.weight": place((2, 3), "F16" if part == "k" else "F32") for part in "qkv"},
            set(),
            {"q.weight", "k.weight", "v.weight"},
        ),
        (
            {f"{part}.weight": place((2, 5 if part == "k" else 3)) for part in "qkv"},
            set(),
            {"q.weight", "k.weight", "v.weight"},
        ),
        ({"other.weight": place((2, 3))}, {"other.weight"}, set()),
    ],
)
def test_what_cannot_be_joined_is_told(tensors, unknown, misshapen):
    found = translate(tensors, SAME_NAMES, NAMES)
    assert (set(found.unknown), set(found.misshapen)) == (unknown, misshapen)


@pytest.mark.parametrize(
    ("tensors", "unknown", "misshapen", "unneeded"),
    [
        ({"qkv.weight": place(())}, (), ("qkv.weight",), ()),
        ({"nothing": place((1,))}, ("nothing",), (), ()),
        ({"second.weight": place((1,))}, (), (), ("second.weight",)),
    ],
)
def test_what_cannot_be_cut_is_told(tensors, unknown, misshapen, unneeded):
    found = translate(tensors, NAMES, SAME_NAMES)
    assert (found.unknown, found.misshapen, found.unneeded) == (unknown, misshapen, unneeded)


def test_documented_names_of_flux_are_the_original_ones_by_other_names():
    """Through module keys, where the tensors are split, and back: the bytes of each are one span again."""
    name = "single_blocks.0.linear1.weight"
    found = translate({name: place((14, 4))}, DIT_ORIGINAL, DIT).tensors
    (documented,) = found
    assert documented == "single_blocks.0.to_qkv_mlp.weight"
    spans = found[documented].spans
    assert all(one.end == other.begin for one, other in pairwise(spans))
    assert (spans[0].begin, spans[-1].end) == (0, 14 * 4 * 4)

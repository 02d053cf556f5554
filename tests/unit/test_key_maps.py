"""One table, two directions: names, shapes and tensors come back as they were."""

import pickle

import pytest
import torch

from diffsynth_core.state_dicts.key_maps import SAME_NAMES, PrefixMap, TableMap

TABLE = TableMap(
    {"blocks.{}.q": "layers.{}.to_q", "blocks.{}.sub.{}.norm": "layers.{}.{}.norm", "blocks.{}.mod": "layers.{}.table"},
    stacked={"blocks.{}.qkv": ("layers.{}.a", "layers.{}.b", "layers.{}.c")},
    unsqueezed={"cls": ("embeddings.cls", 2), "pos": ("embeddings.position.weight", 1)},
    unneeded=("text", "scale"),
)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("blocks.0.q.weight", ("layers.0.to_q.weight",)),
        ("blocks.12.q", ("layers.12.to_q",)),
        ("blocks.3.sub.4.norm.gamma", ("layers.3.4.norm.gamma",)),
        ("blocks.7.mod", ("layers.7.table",)),
        ("blocks.1.qkv.bias", ("layers.1.a.bias", "layers.1.b.bias", "layers.1.c.bias")),
        ("cls", ("embeddings.cls",)),
        ("pos", ("embeddings.position.weight",)),
    ],
)
def test_both_directions_come_from_one_row(theirs, ours):
    assert TABLE.ours(theirs) == ours
    assert {TABLE.theirs(name) for name in ours} == {theirs}


@pytest.mark.parametrize(
    "name", ["blocks.x.q", "blocks.0.q.scale", "blocks.0.qq", "xblocks.0.q", "blocks.0.q.weight.x"]
)
def test_an_unknown_name_is_told_from_one_that_nobody_needs(name):
    assert TABLE.ours(name) is None
    assert TABLE.ours("text.layers.0.weight") == TABLE.ours("scale") == ()
    assert TABLE.ours("texture") is None
    assert TABLE.theirs("layers.0.to_k") is None


def test_tensors_and_shapes_are_cut_and_joined():
    theirs = {
        "blocks.0.q.weight": torch.randn(4, 3),
        "blocks.0.qkv.weight": torch.arange(18.0).view(6, 3),
        "cls": torch.randn(1, 1, 5),
        "pos": torch.randn(1, 7, 5),
    }
    ours = {name: part for key, tensor in theirs.items() for name, part in TABLE.cut(key, tensor).items()}
    assert ours["layers.0.b.weight"].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert ours["embeddings.cls"].shape == (5,)
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    for key, tensor in theirs.items():
        assert TABLE.cut_shape(key, tuple(tensor.shape)) == {name: shapes[name] for name in TABLE.ours(key)}
        assert TABLE.join_shape(key, shapes) == tuple(tensor.shape)
        assert torch.equal(TABLE.join(key, ours), tensor)


def test_prefixes_are_swapped_in_both_directions():
    names = PrefixMap(("visual.", "model.visual."), ("model.", "model.language_model."))
    assert names.ours("visual.x") == ("model.visual.x",)
    assert names.ours("model.x") == ("model.language_model.x",)
    assert names.theirs("model.visual.x") == "visual.x"
    assert names.theirs("other") == "other"


@pytest.mark.parametrize("names", [SAME_NAMES, PrefixMap(("a.", "b.")), TABLE])
def test_maps_are_equal_by_what_they_are_made_of(names):
    copy = pickle.loads(pickle.dumps(names))
    assert copy == names
    assert copy.ours("blocks.0.q") == names.ours("blocks.0.q")
    assert names != PrefixMap(("c.", "d."))

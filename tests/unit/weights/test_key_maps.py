"""One table, two directions: names, shapes and tensors survive a round trip."""

import pickle

import pytest
import torch

from diffsynth_core.weights.key_maps import SAME_NAMES, ComposedKeyMap, PrefixMap, TableMap

TABLE = TableMap(
    {
        "blocks.{}.q": "layers.{}.to_q",
        "blocks.{}.sub.{}.norm": "layers.{}.{}.norm",
        "blocks.{}.mod": "layers.{}.table",
        "blocks.{}.query_norm.scale": "layers.{}.norm_q.weight",
    },
    fused={
        "blocks.{}.qkv": ("layers.{}.a", "layers.{}.b", "layers.{}.c"),
        "blocks.{}.both": (("layers.{}.short", 1), ("layers.{}.long", 4)),
    },
    unsqueezed={"cls": ("embeddings.cls", 2), "pos": ("embeddings.position.weight", 1)},
    ignored=("text", "scale"),
    swap_halves={"head.mod": "out.linear"},
    pointwise={"attn.{}.proj": "attention.{}.out"},
)
CHAIN = ComposedKeyMap(
    TableMap({"typed.{}.fused": "blocks.{}.qkv", "typed.{}.wide": "blocks.{}.both", "typed.last": "head.mod"}), TABLE
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
        ("blocks.5.query_norm.scale", ("layers.5.norm_q.weight",)),
        ("blocks.5.both", ("layers.5.short", "layers.5.long")),
        ("head.mod.bias", ("out.linear.bias",)),
        ("attn.2.proj.weight", ("attention.2.out.weight",)),
    ],
)
def test_both_directions_come_from_one_row(theirs, ours):
    assert TABLE.to_targets(theirs) == ours
    assert {TABLE.to_source(name) for name in ours} == {theirs}


@pytest.mark.parametrize(
    "name",
    [
        *("blocks.x.q", "blocks.0.q.scale", "blocks.0.qq", "xblocks.0.q", "blocks.0.q.weight.x"),
        *("blocks.0.query_norm", "blocks.0.query_norm.weight"),
    ],
)
def test_an_unknown_name_is_told_from_one_that_nobody_needs(name):
    assert TABLE.to_targets(name) is None
    assert TABLE.to_targets("text.layers.0.weight") == TABLE.to_targets("scale") == ()
    assert TABLE.to_targets("texture") is None
    assert TABLE.to_source("layers.0.to_k") is None


def check_there_and_back(table, theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Split tensors and shapes alike, and fuse them again; return the targets."""
    ours = {name: part for key, tensor in theirs.items() for name, part in table.split(key, tensor).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    assert table.to_sources(ours) == list(theirs)
    for key, tensor in theirs.items():
        assert table.split_shape(key, tuple(tensor.shape)) == {name: shapes[name] for name in table.to_targets(key)}
        assert table.fuse_shape(key, shapes) == tuple(tensor.shape)
        assert torch.equal(table.fuse(key, ours), tensor)
    return ours


def test_tensors_and_shapes_are_cut_and_joined():
    ours = check_there_and_back(
        TABLE,
        {
            "blocks.0.q.weight": torch.randn(4, 3),
            "blocks.0.query_norm.scale": torch.randn(4),
            "blocks.0.qkv.weight": torch.arange(18.0).view(6, 3),
            "blocks.0.both.weight": torch.arange(10.0).view(10, 1),
            "blocks.0.both.bias": torch.arange(10.0),
            "cls": torch.randn(1, 1, 5),
            "pos": torch.randn(1, 7, 5),
            "head.mod.weight": torch.arange(8.0).view(4, 2),
            "head.mod.bias": torch.arange(4.0),
            "attn.0.proj.weight": torch.arange(6.0).view(3, 2, 1, 1),
            "attn.0.proj.bias": torch.arange(3.0),
        },
    )
    assert ours["layers.0.b.weight"].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert ours["layers.0.short.bias"].tolist() == [0, 1]
    assert ours["layers.0.long.bias"].tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert ours["embeddings.cls"].shape == (5,)
    assert ours["out.linear.weight"].tolist() == [[4, 5], [6, 7], [0, 1], [2, 3]]
    assert ours["out.linear.bias"].tolist() == [2, 3, 0, 1]
    assert ours["attention.0.out.weight"].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_a_chain_translates_twice():
    assert CHAIN.to_targets("typed.3.fused.bias") == ("layers.3.a.bias", "layers.3.b.bias", "layers.3.c.bias")
    assert CHAIN.to_source("layers.3.b.bias") == "typed.3.fused.bias"
    assert CHAIN.to_targets("typed.3.other") is CHAIN.to_source("layers.0.to_q") is CHAIN.to_source("strange") is None
    assert ComposedKeyMap(PrefixMap(("typed.", "else.")), TABLE).to_targets("typed.0.fused") is None
    assert ComposedKeyMap(SAME_NAMES, TABLE).to_targets("text.weight") == ()
    ours = check_there_and_back(
        CHAIN,
        {
            "typed.1.fused.weight": torch.randn(6, 3),
            "typed.1.wide.bias": torch.arange(10.0),
            "typed.last.weight": torch.arange(4.0).view(4, 1),
        },
    )
    assert ours["layers.1.long.bias"].tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert ours["out.linear.weight"].flatten().tolist() == [2, 3, 0, 1]


def test_what_is_not_there_whole_has_no_name():
    ours = ["layers.0.a.weight", "layers.0.b.weight", "layers.1.c.bias", "layers.0.to_q.weight", "strange"]
    assert TABLE.to_sources(ours) == ["blocks.0.q.weight"]
    assert TABLE.to_sources([*ours, "layers.0.c.weight"]) == ["blocks.0.qkv.weight", "blocks.0.q.weight"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks.0.qkv.weight", (7, 3)),
        ("blocks.0.qkv.weight", (2, 3)),
        ("blocks.0.qkv.weight", ()),
        ("blocks.0.both.weight", (11, 3)),
        ("cls", (1, 3, 5)),
        ("cls", (3, 1, 5)),
        ("attn.0.proj.weight", (3, 2, 3, 3)),
    ],
)
@pytest.mark.parametrize("table", [TABLE, ComposedKeyMap(SAME_NAMES, TABLE)], ids=["table", "chain"])
def test_what_cannot_be_cut_comes_out_in_shapes_that_do_not_fit(table, name, shape):
    """Neither silently rounded nor an exception: the module expects other shapes."""
    whole = {"blocks.0.qkv.weight": (6, 3), "blocks.0.both.weight": (10, 3), "cls": (1, 1, 5)}.get(name, (3, 2, 1, 1))
    assert table.split_shape(name, shape).keys() == table.split_shape(name, whole).keys()
    assert table.split_shape(name, shape) != table.split_shape(name, whole)


def test_prefixes_are_swapped_in_both_directions():
    names = PrefixMap(("visual.", "model.visual."), ("model.", "model.language_model."))
    assert names.to_targets("visual.x") == ("model.visual.x",)
    assert names.to_targets("model.x") == ("model.language_model.x",)
    assert names.to_source("model.visual.x") == "visual.x"
    assert names.to_source("other") == "other"


@pytest.mark.parametrize("names", [SAME_NAMES, PrefixMap(("a.", "b.")), TABLE, CHAIN])
def test_maps_are_equal_by_what_they_are_made_of(names):
    copy = pickle.loads(pickle.dumps(names))
    assert copy == names
    assert hash(copy) == hash(names)
    assert copy.to_targets("blocks.0.q") == names.to_targets("blocks.0.q")
    assert names != PrefixMap(("c.", "d."))

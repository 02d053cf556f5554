"""Weights named by a user: a file, shards, an index, a folder; and incomplete ones."""

import json

import pytest
import torch
from safetensors.torch import save_file

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.weights.weight_sets import open_weights
from tests.naming import names


def write_shards(folder, index=True):
    """Two shards of one tensor each."""
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, tensor in zip(names, ("b", "a"), strict=True):
        save_file({tensor: torch.ones(2)}, folder / name, {"format": "pt", "shard": tensor})
    if index:
        content = {"metadata": {"total_size": 16}, "weight_map": {"b": names[0], "a": names[1]}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return [folder / name for name in names]


@pytest.mark.parametrize("named", ["folder", "index", "shards", "folder without index"])
def test_shards_are_one_set(tmp_path, named):
    shards = write_shards(tmp_path, index="without" not in named)
    paths = {"index": [tmp_path / "model.safetensors.index.json"], "shards": shards}.get(named, [tmp_path])
    found = open_weights(paths)
    assert list(found.tensors) == ["b", "a"]
    assert found.files == tuple(shards)
    assert found.nbytes == 16
    assert (found.metadata_value("format"), found.metadata_value("shard"), found.metadata_value("none")) == (
        "pt",
        None,
        None,
    )
    assert (found.index_metadata == {"total_size": 16}) is (named in ("folder", "index"))


def contradict(folder):
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"]["a"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(content))


def lead_outside(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')


def add_a_model(folder):
    (folder / "model.safetensors.index.json").unlink()
    save_file({"a": torch.ones(2)}, folder / "other.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
            names("1 shard", "missing", "{folder}"),
        ),
        (contradict, names("disagree", "1 tensor", "`a`")),
        (lead_outside, names("../x.safetensors")),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
            names("a list", "an object"),
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}'),
            names("weight_map.a", 1, "a string"),
        ),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[" * 9999), names("nested too deeply")),
        (add_a_model, names("several models", "model-00001-of-00002.safetensors")),
    ],
)
def test_what_is_not_whole_is_refused(says, tmp_path, change, message):
    write_shards(tmp_path)
    change(tmp_path)
    with pytest.raises(DiffSynthError) as caught:
        open_weights([tmp_path])
    says(caught.value.problems)
    assert str(caught.value) == message.format(folder=tmp_path)


def test_a_shard_alone_is_not_all_of_them(says, tmp_path):
    first, _ = write_shards(tmp_path)
    with pytest.raises(DiffSynthError) as caught:
        open_weights([first])
    says(caught.value.problems)
    assert str(caught.value) == names("1 shard", "not listed", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.pth", names("pickled")),
        ("none.safetensors", names("does not exist")),
        ("empty", names("no safetensors files")),
    ],
)
def test_other_files_are_refused(says, tmp_path, name, message):
    (tmp_path / "x.pth").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DiffSynthError) as caught:
        open_weights([tmp_path / name])
    says(caught.value.problems)
    assert str(caught.value) == names(tmp_path / name, message)


def test_the_same_tensor_in_two_files(tmp_path):
    for name in ("one", "two"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(DiffSynthError, match="1 duplicate tensor in"):
        open_weights([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])

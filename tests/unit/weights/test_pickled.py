"""Pickled weight files: read as tensors and nothing else, and accepted like other weight files."""

import pickle

import pytest
import torch

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.weights.headers import read_headers
from diffsynth_core.weights.pickled import read_pickled
from diffsynth_core.weights.tensors import iterate_tensors

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3).bfloat16(), "b": torch.tensor([1.5])}


@pytest.fixture(params=["zip", "legacy", "wrapped"])
def path(request, tmp_path):
    content = {"model_state": TENSORS} if request.param == "wrapped" else TENSORS
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=request.param != "legacy")
    return tmp_path / "x.pth"


def test_tensors_and_headers_are_read(path):
    read = read_pickled(path)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    assert dict(iterate_tensors(path)).keys() == TENSORS.keys()
    headers = read_headers([path])
    assert {name: (header.dtype, header.shape, header.path) for name, header in headers.items()} == {
        "a.weight": ("BF16", (2, 3), path),
        "b": ("F32", (1,), path),
    }


class Runs:
    def __reduce__(self):
        return open, ("ran", "w")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Runs(), "contains more than tensors"),
        ({"a": torch.zeros(1), "epoch": 3}, "contains something other than named tensors"),
        ([torch.zeros(1)], "contains something other than named tensors"),
    ],
)
def test_what_is_no_file_of_tensors_is_refused_and_runs_nothing(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(DiffSynthError, match=message):
        read_headers([tmp_path / "x.pth"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "is a git-lfs pointer"),
        (b"text", r"is damaged: cannot read it as a file of tensors \(\w+\)|contains more than tensors"),
        (pickle.dumps({"a": 1}), "contains more than tensors|is damaged|contains something other than named tensors"),
        (b"PK\x03\x04 truncated", "is damaged"),
    ],
)
def test_a_damaged_file_is_told(tmp_path, content, reason):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(DiffSynthError, match=reason) as caught:
        read_pickled(tmp_path / "x.pth")
    assert "weights_only" not in str(caught.value)


def test_a_file_cut_short_is_told(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DiffSynthError, match=r"is damaged|holds other things"):
        read_headers([path])

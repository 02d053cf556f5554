"""Safetensors files written atomically, with the hash of the file on disk."""

import hashlib
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffsynth_core.checkpoints.tensor_files import write_tensors
from diffsynth_core.errors import DiffSynthError

TENSORS = {
    "a": torch.randn(3, 4),
    "b.c": torch.arange(5),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "one": torch.tensor(2.0),
}


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "step-1.safetensors"
    digest = write_tensors(path, TENSORS, {"family": "qwen-image"})
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    with safe_open(path, framework="pt") as stream:
        assert stream.metadata() == {"format": "pt", "family": "qwen-image"}
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_the_order_of_tensors_does_not_show_in_the_file(tmp_path):
    first = write_tensors(tmp_path / "a", TENSORS, {})
    assert write_tensors(tmp_path / "b", dict(reversed(TENSORS.items())), {}) == first
    assert write_tensors(tmp_path / "c", {**TENSORS, "one": torch.tensor(3.0)}, {}) != first


def test_parameters_and_views_are_written_by_value(tmp_path):
    parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    write_tensors(
        tmp_path / "a", {"whole": parameter, "turned": parameter.clone().T, "part": parameter.clone()[:, 1]}, {}
    )
    read = load_file(tmp_path / "a")
    assert read["whole"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert read["part"].tolist() == [1, 4]
    assert parameter.requires_grad


BROKEN = {
    "sparse": ({"a": torch.eye(3).to_sparse()}, {}),
    "complex": ({"a": TENSORS["a"], "b": torch.zeros(2, dtype=torch.complex128)}, {}),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("existed", [False, True])
def test_a_failure_leaves_neither_a_new_name_nor_a_spoilt_old_file(tmp_path, broken, existed):
    path = tmp_path / "step-1.safetensors"
    before = write_tensors(path, TENSORS, {}) if existed else None
    with pytest.raises((RuntimeError, ValueError, TypeError, KeyError)):
        write_tensors(path, *BROKEN[broken])
    assert [item.name for item in tmp_path.iterdir()] == ([path.name] if existed else [])
    assert not existed or hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_a_full_disk_leaves_nothing_and_is_one_clear_error(tmp_path):
    path = tmp_path / "step-1.safetensors"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(Exception) as caught:
            write_tensors(path, {"a": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    assert isinstance(caught.value, DiffSynthError), repr(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.problems[0].hint

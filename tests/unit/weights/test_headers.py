"""Safetensors headers: equal to the safetensors library's for valid files, and one clear error for any damage."""

import json

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.weights.headers import read_header, read_headers
from tests.naming import names

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16, "I32": torch.int32,
    "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def raw(header, data=b"", length=None) -> bytes:
    """Write a file with this header (an object, or raw bytes)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(**changes) -> dict:
    """Return the header of one float32 tensor of 2 x 2, 16 bytes."""
    return {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}


def two(first, second) -> dict:
    """Return the headers of two int8 tensors with these offsets."""
    return {
        name: {"dtype": "I8", "shape": [offsets[1] - offsets[0]], "data_offsets": list(offsets)}
        for name, offsets in (("a", first), ("b", second))
    }


def test_a_good_file_reads_as_the_library_reads_it(tmp_path):
    path = tmp_path / "good.safetensors"
    tensors = {f"{name}.weight": torch.ones(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 4),
        "long": torch.zeros(1, 2, 3, 4, 5),
        "": torch.ones(1),
    }
    save_file(tensors, path, metadata={"format": "pt", "ü": "ö"})
    header = read_header(path)
    with safe_open(path, framework="pt") as library:
        assert header.metadata == library.metadata()
        assert header.tensors.keys() == set(library.keys())
        for name, tensor in header.tensors.items():
            assert tensor.dtype == library.get_slice(name).get_dtype()
            assert list(tensor.shape) == library.get_slice(name).get_shape()
            assert tensor.path == path
    assert {header.tensors[f"{name}.weight"].dtype for name in DTYPES} == set(DTYPES)


def test_a_file_without_tensors_or_metadata_is_read(tmp_path):
    path = tmp_path / "none.safetensors"
    path.write_bytes(raw({}))
    assert dict(read_header(path).tensors) == {} and dict(read_header(path).metadata) == {}


DAMAGES = {
    "empty": b"",
    "five bytes": b"\x01\0\0\0\0",
    "length alone": (100).to_bytes(8, "little"),
    "text": b"<!DOCTYPE html><html><body>404</body></html>",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "longer header than file": raw(one(), b"x" * 16, length=1000),
    "absurd length": raw(one(), b"x" * 16, length=2**63),
    "no JSON": raw(b"{nonsense}", b"x" * 16),
    "no UTF-8": raw(b'{"\xff": 1}'),
    "a list": raw([1, 2]),
    "a number": raw(3),
    "truncated": raw(one(), b"x" * 15),
    "no data": raw(one()),
    "surplus bytes": raw(one(), b"x" * 17),
    "shape and offsets disagree": raw(one(shape=[2, 3]), b"x" * 16),
    "negative side": raw(one(shape=[-2, -2]), b"x" * 16),
    "negative offset": raw(one(data_offsets=[-16, 0]), b""),
    "offsets reversed": raw(one(data_offsets=[16, 0]), b"x" * 16),
    "three offsets": raw(one(data_offsets=[0, 8, 16]), b"x" * 16),
    "offsets as text": raw(one(data_offsets=["0", "16"]), b"x" * 16),
    "no offsets": raw({"a": {"dtype": "F32", "shape": [2, 2]}}, b"x" * 16),
    "unknown dtype": raw(one(dtype="F33"), b"x" * 16),
    "no shape": raw(one(shape=None), b"x" * 16),
    "fractions in a shape": raw(one(shape=[2.5, 2]), b"x" * 16),
    "a shape as text": raw(one(shape="22"), b"x" * 16),
    "an entry that is no object": raw({"a": 7}, b""),
    "gap in front": raw(one(data_offsets=[4, 20]), b"x" * 20),
    "gap between": raw(two((0, 4), (6, 8)), b"x" * 8),
    "overlap": raw(two((0, 5), (4, 8)), b"x" * 8),
    "the same bytes twice": raw(two((0, 8), (0, 8)), b"x" * 8),
    "a name twice": raw(b'{"a": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}, "a": {"dtype": "I8", "shape": [1], "data_offsets": [1, 2]}}', b"xx"),
    "metadata that is no object": raw({"__metadata__": [1]}, b""),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_one_clear_error_that_names_the_file(says, tmp_path, damage):
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGES[damage])
    with pytest.raises(DiffSynthError) as caught:
        read_header(path)
    says(caught.value.problems)
    assert f"`{path}`" in str(caught.value)
    assert caught.value.problems[0].hint


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_library_refuses_every_damage_too(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGES[damage])
    with pytest.raises(SafetensorError), safe_open(path, framework="pt"):
        pass


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("truncated", names("truncated", "16 bytes", 15)),
        ("surplus bytes", names("1 byte", "header")),
        ("unknown dtype", names("header", "`a`", "inconsistent")),
        ("overlap", names("overlap")),
        ("gap between", names("overlap")),
        ("empty", names("0 bytes", "not a valid safetensors")),
    ],
)
def test_the_error_says_what_is_wrong(tmp_path, damage, expected):
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGES[damage])
    with pytest.raises(DiffSynthError) as caught:
        read_header(path)
    assert str(caught.value) == expected


def test_every_cut_of_a_good_file_is_told(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3), "b": torch.zeros(2, 2)}, path)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(DiffSynthError, match=r"model\.safetensors"):
            read_header(path)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()], ids=["nothing", "a folder"])
def test_what_cannot_be_opened_is_told(says, tmp_path, make):
    make(tmp_path / "gone.safetensors")
    with pytest.raises(DiffSynthError) as caught:
        read_header(tmp_path / "gone.safetensors")
    says(caught.value.problems)
    assert str(caught.value) == names("cannot read", tmp_path / "gone.safetensors")


def test_shards_are_read_together_and_hold_no_tensor_twice(tmp_path):
    first, second, third = (tmp_path / f"{number}.safetensors" for number in (1, 2, 3))
    save_file({"a": torch.ones(1), "b": torch.ones(2)}, first)
    save_file({"c": torch.ones(3)}, second)
    save_file({"b": torch.ones(2)}, third)
    assert {name: (tensor.shape, tensor.path) for name, tensor in read_headers([first, second]).items()} == {
        "a": ((1,), first), "b": ((2,), first), "c": ((3,), second),
    }  # fmt: skip
    with pytest.raises(DiffSynthError) as caught:
        read_headers([first, second, third])
    assert str(caught.value) == names("`b`", first, third)


def test_a_header_that_says_two_things_of_one_tensor_is_refused(tmp_path):
    text = json.dumps(one())[:-1] + ", " + json.dumps(one(dtype="I32"))[1:]
    (tmp_path / "x.safetensors").write_bytes(raw(text.encode(), bytes(16)))
    with pytest.raises(DiffSynthError, match="cannot read its header"):
        read_header(tmp_path / "x.safetensors")


def test_a_header_nested_without_end_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(raw(b"[" * 100_000))
    with pytest.raises(DiffSynthError, match="cannot read its header"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("shape", [(0, 2**64), ("8", 10**30), ("8", 2**31), (0.5, 2), (True,)])
def test_sides_that_are_none(tmp_path, shape):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}))
    with pytest.raises(DiffSynthError, match="the header entry of `x` is inconsistent"):
        read_header(path)


@pytest.mark.parametrize("content", [{"\ud800": {}}, {"__metadata__": {"said": "\ud800"}}])
def test_half_a_character(tmp_path, content):
    path, text = tmp_path / "x.safetensors", json.dumps(content).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(DiffSynthError, match="cannot read its header"):
        read_header(path)

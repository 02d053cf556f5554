"""Tensor headers of weight files: safetensors headers, read, checked and written without torch, and pickled files.

Format: 8 bytes little-endian header length, a JSON header, then the tensor bytes
(https://github.com/huggingface/safetensors#format).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.files import PICKLED_SUFFIXES
from diffsynth_core.json_files import parse_json
from diffsynth_core.progress import pluralize
from diffsynth_core.weights.dtypes import BITS_PER_ELEMENT, safetensors_dtype
from diffsynth_core.weights.pickled import read_pickled

MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library."""
HEADER_ALIGNMENT = 8
"""Headers are padded to a multiple of this number of bytes."""
MAX_SIZE = 2**63
"""Maximum side of a tensor: next to a side of 0, a header could declare any."""
METADATA = "__metadata__"
"""Key of the text metadata in a header."""
GGUF = b"GGUF"
"""First bytes of a GGUF file. Source: docs/gguf.md of ggml-org/ggml."""


@dataclass(frozen=True)
class TensorHeader:
    """Shape and dtype of one tensor; `dtype` is a safetensors name, such as `BF16`."""

    dtype: str
    shape: tuple[int, ...]
    path: Path

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * BITS_PER_ELEMENT[self.dtype] // 8


@dataclass(frozen=True)
class Header:
    """All tensors of one file, its text metadata, and the byte offsets (begin, end) of each tensor in the file."""

    tensors: Mapping[str, TensorHeader]
    metadata: Mapping[str, str]
    spans: Mapping[str, tuple[int, int]]


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file, and check it against the size of the file.

    Raises:
        DiffSynthError: if the file is not a safetensors file, is truncated, or its header has wrong offsets.
    """
    try:
        with path.open("rb") as stream:
            return _read(path, stream, path.stat().st_size)
    except OSError as error:
        raise DiffSynthError(f"cannot read `{path}`: {error.strerror}") from error


def parse_header(path: Path, content: bytes) -> Header:
    """Return the header of a safetensors file that has been read, as `read_header` does; `path` is for messages."""
    return _read(path, BytesIO(content), len(content))


def _read(path: Path, stream: BinaryIO, size: int) -> Header:
    begin = stream.read(8)
    if begin.startswith(GGUF):
        raise _gguf(path)
    length = int.from_bytes(begin, "little")
    if size < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
        raise _damaged(path, size)
    try:
        content = parse_json(stream.read(length).decode("utf-8"))
    except ValueError as error:  # neither UTF-8 nor JSON
        raise _damaged(path, size) from error
    return _parse(path, content, 8 + length, size)


def _all_utf8(texts: Iterable[str]) -> bool:
    """Return whether all strings can be encoded as UTF-8: JSON may contain unpaired surrogates."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _gguf(path: Path) -> DiffSynthError:
    return DiffSynthError(
        f"`{path}` is a GGUF file, quantized for inference: training and merging do not support it",
        "use the safetensors file it was made from, in bfloat16 or scaled fp8",
    )


def _damaged(path: Path, size: int) -> DiffSynthError:
    return DiffSynthError(
        f"`{path}` ({pluralize(size, 'byte')}) is not a valid safetensors file: cannot read its header",
        "download the file again",
    )


def _parse(path: Path, content: Any, data_begin: int, size: int) -> Header:
    data_bytes = size - data_begin
    if not isinstance(content, dict):
        raise _damaged(path, size)
    metadata = content.pop(METADATA, {})
    if not _all_utf8(content):
        raise _damaged(path, size)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DiffSynthError(f"`{path}`: the metadata in its header must be strings", "download the file again")
    if not _all_utf8([*metadata, *metadata.values()]):
        raise _damaged(path, size)
    tensors: dict[str, TensorHeader] = {}
    spans: dict[str, tuple[int, int]] = {}
    for name, entry in content.items():
        try:
            dtype, shape, (begin, end) = (
                str(entry["dtype"]),
                tuple(entry["shape"]),
                entry["data_offsets"],
            )
            sound = (
                all(type(side) is int and 0 <= side < MAX_SIZE for side in (*shape, begin, end))
                and end - begin == math.prod(shape) * BITS_PER_ELEMENT[dtype] // 8
            )
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise DiffSynthError(f"`{path}`: the header entry of `{name}` is inconsistent", "download the file again")
        tensors[name] = TensorHeader(dtype, shape, path)
        spans[name] = (begin, end)
    end_of_data = 0
    for begin, end in sorted(spans.values()):
        if begin != end_of_data:
            raise DiffSynthError(
                f"`{path}`: the tensors in its header overlap or leave gaps", "download the file again"
            )
        end_of_data = end
    if end_of_data != data_bytes:
        raise DiffSynthError(
            f"`{path}` is truncated: its header declares {pluralize(end_of_data, 'byte')} of tensors, found {data_bytes}"
            if end_of_data > data_bytes
            else f"`{path}` has {pluralize(data_bytes - end_of_data, 'byte')} that its header does not declare",
            "download the file again",
        )
    return Header(
        tensors, metadata, {name: (data_begin + begin, data_begin + end) for name, (begin, end) in spans.items()}
    )


def make_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return the 8 bytes of length and the JSON header, padded with spaces, of a file with tensors in this order.

    Args:
        tensors: (name, safetensors dtype, shape).
    """
    content: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + math.prod(shape) * BITS_PER_ELEMENT[dtype] // 8
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def shapes_of(tensors: Mapping[str, TensorHeader]) -> dict[str, tuple[int, ...]]:
    """Return the shapes by name."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def read_headers(paths: Sequence[Path]) -> dict[str, TensorHeader]:
    """Return the tensors of several shards together.

    Raises:
        DiffSynthError: see `read_header`; also if two shards contain the same tensor.
    """
    tensors: dict[str, TensorHeader] = {}
    for path in paths:
        for name, tensor in _tensors_of(path).items():
            if name in tensors:
                raise DiffSynthError(
                    f"`{name}` is in both `{tensors[name].path}` and `{path}`",
                    "pass each shard of one model once",
                )
            tensors[name] = tensor
    return tensors


def _tensors_of(path: Path) -> Mapping[str, TensorHeader]:
    if path.suffix not in PICKLED_SUFFIXES:
        return read_header(path).tensors
    try:
        return {
            name: TensorHeader(safetensors_dtype(tensor.dtype), tuple(tensor.shape), path)
            for name, tensor in read_pickled(path).items()
        }
    except KeyError as error:
        raise DiffSynthError(
            f"`{path}` contains tensors of dtype torch.{error.args[0]}, which is not a dtype of weights"
        ) from error

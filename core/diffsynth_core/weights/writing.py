"""Writing safetensors files tensor by tensor.

The library's own writer requires all tensors on the host at once, and orders metadata at random; here tensors are
converted and written one at a time, and equal tensors give equal bytes.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffsynth_core.weights.dtypes import safetensors_dtype
from diffsynth_core.weights.headers import make_header


class LazyStateDict(Mapping[str, Tensor]):
    """Tensors that are computed on access and not kept: the fused matrices of a model may have 14 GB in total."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = makers

    def __getitem__(self, key: str) -> Tensor:
        return self._makers[key]()

    def __contains__(self, key: object) -> bool:
        return key in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> str:
    """Write a safetensors file; at most one tensor at a time is copied to the host.

    Args:
        tensors: on any device; each is accessed twice, for its shape and for its values, and released in between.
        dtypes: key -> dtype to convert to; others are unchanged.

    Returns:
        sha256 of the bytes, in hex.

    Raises:
        OSError: if the disk refuses.
    """
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        for part in safetensors_bytes(tensors, metadata, dtypes):
            stream.write(part)
            digest.update(part)
    return digest.hexdigest()


def safetensors_bytes(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtypes: Mapping[str, torch.dtype] | None = None
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file: its header, then each tensor."""
    kinds = _kinds(tensors, dtypes)
    yield make_header(((name, safetensors_dtype(dtype), shape) for name, (shape, dtype) in kinds.items()), metadata)
    for name, (_, dtype) in kinds.items():
        yield _bytes(tensors[name], dtype)


def access_as_written(tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype] | None = None) -> None:
    """Access tensors as often and in the order in which they are written, without writing them: for processes that
    take part in gathering the tensors that another one writes.
    """
    for name in _kinds(tensors, dtypes):
        tensors[name]


def _kinds(
    tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype] | None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each tensor in a file, in its order."""
    kinds = {name: _kind(tensors[name]) for name in tensors}
    wanted = {name: (shape, (dtypes or {}).get(name, dtype)) for name, (shape, dtype) in kinds.items()}
    # Wide dtypes first, so that every tensor starts at a multiple of its element size.
    return {name: wanted[name] for name in sorted(wanted, key=lambda name: (-wanted[name][1].itemsize, name))}


def _kind(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    """Return shape and dtype of a tensor."""
    return tuple(tensor.shape), tensor.dtype


def _bytes(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    """Return the values of a tensor in a dtype."""
    value = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    return value.reshape(-1).view(torch.uint8).numpy().data

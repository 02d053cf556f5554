"""Writing safetensors files tensor by tensor.

The library's own writer wants all tensors on the host at once and orders metadata at random; here one tensor at a time
is converted and written, and the same tensors give the same bytes.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffsynth_core.weights.dtypes import safetensors_dtype
from diffsynth_core.weights.headers import make_header


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> str:
    """Write a safetensors file; no more than one tensor is copied to the host at a time.

    Args:
        tensors: on any device; each is asked for twice, for its shape and for its values, and let go in between.
        dtypes: dtypes to convert to, by name; others stay as they are.

    Returns: sha256 of the bytes, in hex.

    Raises:
        OSError: when the disk refuses.
    """
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        for part in safetensors_bytes(tensors, metadata, dtypes):
            stream.write(part)
            digest.update(part)
    return digest.hexdigest()


def safetensors_bytes(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtypes: Mapping[str, torch.dtype] | None = None
) -> Iterator[bytes]:
    """The bytes of a safetensors file: its header, then each tensor."""
    kinds = {name: _kind(tensors[name]) for name in tensors}
    wanted = {name: (dtypes or {}).get(name, dtype) for name, (_, dtype) in kinds.items()}
    # Wide formats first, so that every tensor begins at a multiple of its element's size.
    order = sorted(tensors, key=lambda name: (-wanted[name].itemsize, name))
    yield make_header(((name, safetensors_dtype(wanted[name]), kinds[name][0]) for name in order), metadata)
    for name in order:
        yield _bytes(tensors[name], wanted[name])


def _kind(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a tensor."""
    return tuple(tensor.shape), tensor.dtype


def _bytes(tensor: Tensor, dtype: torch.dtype) -> bytes:
    """The values of a tensor in a dtype."""
    value = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    return value.reshape(-1).view(torch.uint8).numpy().tobytes()

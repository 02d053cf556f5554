"""Atomic writing of tensors."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffsynth_core.files import atomic_write
from diffsynth_core.weights.writing import write_safetensors


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> str:
    """Write a safetensors file atomically, and return the sha256 of its bytes.

    Args:
        tensors: on any device.
        dtypes: key -> dtype to convert to while writing.
    """
    with atomic_write(path) as temporary:
        return write_safetensors(temporary, tensors, {"format": "pt", **metadata}, dtypes)

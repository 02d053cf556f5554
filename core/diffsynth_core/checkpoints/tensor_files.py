"""Writing tensors so that a stop at any moment leaves no half file."""

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
    """Write a safetensors file, whole or not at all; returns the sha256 of its bytes.

    `dtypes` names dtypes to convert to while writing; tensors may be on any device.
    """
    with atomic_write(path) as temporary:
        return write_safetensors(temporary, tensors, {"format": "pt", **metadata}, dtypes)

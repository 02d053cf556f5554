"""Writing tensors so that a stop at any moment leaves no half file."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from diffsynth_core.files import replacing
from diffsynth_core.state_dicts.writing import save_tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file, whole or not at all; returns the sha256 of its bytes."""
    with replacing(path) as temporary:
        save_tensors(tensors, temporary, {"format": "pt", **metadata})
        with temporary.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return digest

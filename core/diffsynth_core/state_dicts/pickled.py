"""Weights in PyTorch's pickled format (`.pth`), read with `weights_only` and nothing else."""

from pathlib import Path
from typing import TYPE_CHECKING

from diffsynth_core.errors import DiffSynthError

if TYPE_CHECKING:
    from torch import Tensor

PICKLED_ENDINGS = (".pth", ".pt", ".bin", ".ckpt")
WRAPPERS = ("model_state", "state_dict", "model", "module")
"""Names below which some programs put the tensors."""


def read_pickled(path: Path) -> "dict[str, Tensor]":
    """The tensors of a pickled file, mapped into memory: none is read before it is used.

    Raises:
        DiffSynthError: when the file is damaged, holds anything but tensors, or would run code.
    """
    import torch

    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)  # written before torch 1.6
    except Exception as error:
        raise DiffSynthError(
            f"`{path}` cannot be read as a file of tensors: {' '.join(str(error).split())[:200]}",
            "fetch the file again, or name a safetensors copy",
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise DiffSynthError(
            f"`{path}` holds something besides named tensors", "name a file that holds the tensors of one model"
        )
    return content

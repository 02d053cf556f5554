"""Reading of weights in PyTorch's pickled format (`.pth`), with `weights_only`."""

from pathlib import Path
from typing import TYPE_CHECKING

from diffsynth_core.errors import DiffSynthError

if TYPE_CHECKING:
    from torch import Tensor

POINTER = b"version https://git-lfs"
"""First bytes of a Git LFS pointer."""
WRAPPERS = ("model_state", "state_dict", "model", "module")
"""Keys below which some programs store the tensors."""


def read_pickled(path: Path) -> "dict[str, Tensor]":
    """Return the tensors of a pickled file, memory-mapped: none is read before it is used.

    Raises:
        DiffSynthError: if the file is damaged, contains anything but tensors, or would run code.
    """
    import pickle

    import torch

    _refuse_what_is_none(path)
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)  # written before torch 1.6
    except pickle.UnpicklingError as error:
        raise DiffSynthError(
            f"`{path}` contains more than tensors, or could run code when it is loaded",
            "use a safetensors copy",
        ) from error
    except Exception as error:
        raise DiffSynthError(
            f"`{path}` is damaged: cannot read it as a file of tensors ({type(error).__name__})",
            "download the file again",
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise DiffSynthError(
            f"`{path}` contains something other than named tensors", "use a file with the tensors of one model"
        )
    return content


def _refuse_what_is_none(path: Path) -> None:
    """Reject files that are not pickled weights, about which torch's messages sound as if they were dangerous."""
    try:
        with path.open("rb") as stream:
            begin = stream.read(len(POINTER))
    except OSError as error:
        raise DiffSynthError(f"cannot read `{path}`: {error.strerror}") from error
    if not begin:
        raise DiffSynthError(f"`{path}` is empty", "download the file again")
    if begin == POINTER:
        raise DiffSynthError(f"`{path}` is a git-lfs pointer, not the file itself", "download it with `git lfs pull`")

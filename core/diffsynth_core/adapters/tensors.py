"""Tensors of a module, set by name."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Place = Callable[[nn.Module, str, Tensor], None]
"""(module, name, tensor): sets a parameter or buffer, which may be on the meta device until then."""
Whole = Callable[[Tensor], Tensor]
"""Makes a tensor of a module whole, of which a process may hold a part."""


def as_is(tensor: Tensor) -> Tensor:
    """Return a tensor of which every process holds the whole."""
    return tensor


def place(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer of a module; a parameter takes gradients if the one before did."""
    parent_name, _, leaf = name.rpartition(".")
    parent = module.get_submodule(parent_name)
    before = getattr(parent, leaf)
    setattr(parent, leaf, nn.Parameter(tensor, before.requires_grad) if isinstance(before, nn.Parameter) else tensor)


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move the buffers of a module, and not its parameters, which may wait in host memory."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))

"""Where activations wait for the backward pass."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

Packed = Tensor | tuple[torch.device, Tensor]


class OffloadActivations(saved_tensors_hooks):
    """Within this context what the backward pass needs waits in host memory; parameters stay where they are.

    Together with gradient checkpointing these are the inputs of the checkpointed blocks
    (`torch.autograd.graph.save_on_cpu`, which would carry parameters over too). Casts that autocast makes of float32
    weights are no parameters, and outside of checkpointed blocks they are carried over.
    """

    def __init__(self) -> None:
        super().__init__(_to_host, _from_host)


def is_weight(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter or a view of one: a linear layer saves the transposed view of its weight."""
    # `_base` is private, but no public function returns the base of a view: `tests/unit/test_private_names.py`.
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def _to_host(tensor: Tensor) -> Packed:
    if is_weight(tensor) or tensor.device.type == "cpu":
        return tensor
    waiting = torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout, pin_memory=True)
    waiting.copy_(tensor)
    return tensor.device, waiting


def _from_host(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, waiting = packed
    moved: Tensor = waiting.to(device, non_blocking=True)
    return moved

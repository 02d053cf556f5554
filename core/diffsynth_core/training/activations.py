"""Where activations wait for the backward pass."""

from collections import deque
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from diffsynth_core.adapters.streams import CopyStream, Event, copy_stream

LEAVING = 8
"""Tensors that may be on their way to host memory at a time: about the inputs of two blocks."""


class OffloadActivations(saved_tensors_hooks):
    """Within this context what the backward pass needs waits in host memory; parameters stay where they are.

    Together with gradient checkpointing these are the inputs of the checkpointed blocks
    (`torch.autograd.graph.save_on_cpu`, which would carry parameters over too). Casts that autocast makes of float32
    weights are no parameters, and outside of checkpointed blocks they are carried over.

    Copies run beside the computation, which frees a tensor only once it is copied.
    """

    def __init__(self, copies: CopyStream | None = None) -> None:
        """`copies`: of tensors on any device; None: those of the device of each tensor, unless that is the CPU."""
        super().__init__(self._to_host, _from_host)
        self._copies = copies
        self._last: ref[HostActivation] | None = None
        self._leaving: deque[tuple[Tensor, CopyStream, Event]] = deque()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._wait_for_all_but(0)

    def _to_host(self, tensor: Tensor) -> "Tensor | HostActivation":
        if is_weight(tensor) or (self._copies is None and tensor.device.type == "cpu"):
            return tensor
        pinned = tensor.device.type == "cuda"
        waiting = torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout, pin_memory=pinned)
        packed = HostActivation(tensor, waiting, self._copies or copy_stream(tensor.device), self._last)
        self._leaving.append((tensor.detach(), packed.copies, packed.copied))
        self._wait_for_all_but(LEAVING)
        self._last = ref(packed)
        return packed

    def _wait_for_all_but(self, number: int) -> None:
        """Have the computation wait until no more than this many tensors are being copied."""
        while len(self._leaving) > number:
            _, copies, copied = self._leaving.popleft()
            copies.wait(copied)


def _from_host(packed: Any) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed.restore()


def is_weight(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter or a view of one: a linear layer saves the transposed view of its weight."""
    # `_base` is private, but no public function returns the base of a view: `tests/unit/test_private_names.py`.
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


class HostActivation:
    """A tensor that waits in host memory.

    Each one that the backward pass asks for has one more copied back ahead of it: the last one saved that is neither
    back nor on its way. So the inputs of the next block arrive while a block is recomputed from as many.
    """

    def __init__(
        self, tensor: Tensor, waiting: Tensor, copies: CopyStream, before: "ref[HostActivation] | None"
    ) -> None:
        """Begin to copy a tensor to `waiting`.

        Args:
            before: what was saved before it, for as long as the graph needs it.
        """
        self._back: tuple[Tensor, Event] | None = None
        self.copies = copies
        self._device, self._waiting, self._before = tensor.device, waiting, before
        self._asked_for = False
        self.copied = copies.copy(waiting, tensor.detach(), copies.computed())

    def __del__(self) -> None:
        if self._back:  # nobody has asked for it: its memory is freed while it may still be copied
            self.copies.wait(self._back[1])

    def restore(self) -> Tensor:
        """Return the tensor on its device; it may be asked for again."""
        if self._back is None:
            self._copy_back()
        assert self._back
        (tensor, copied), self._back, self._asked_for = self._back, None, True
        self.copies.wait(copied)
        ahead = self._before and self._before()
        while ahead and (ahead._back or ahead._asked_for):
            ahead = ahead._before and ahead._before()
        if ahead:
            ahead._copy_back()
        return tensor

    def _copy_back(self) -> None:
        # Its copy to host memory is before it in the same queue.
        moved = torch.empty_like(self._waiting, device=self._device, pin_memory=False)
        self._back = moved, self.copies.copy(moved, self._waiting, self.copies.computed())

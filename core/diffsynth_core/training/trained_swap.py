"""Blocks that train while their weights wait in host memory, and are on the device during their passes alone.

The forward pass of such a block copies its weights to the device and frees the copies at its end; gradient
checkpointing keeps nothing of them. When the backward pass recomputes the block, they are copied again, and stay until
each is updated, which a fused backward pass does as soon as its gradient is there; the updated weight goes back to the
host. The next block is copied one ahead, in either pass. Models checkpoint nothing where there are no gradients: then
hooks of the blocks copy their weights.

A parameter is the same object all the time: only its data is exchanged, while nothing that a graph has saved refers to
it. So gradients are summed in the same order as without, which an autograd function of the block would change.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffsynth_core.adapters.streams import CopyStream, Event, copy_stream
from diffsynth_core.host_memory import allocate, pin


class WaitingBlock:
    """The trained weights of a block: in host memory, and sometimes on the device too."""

    def __init__(self, module: nn.Module, device: torch.device, copies: CopyStream) -> None:
        self._device, self._copies = device, copies
        self.weights = [weight for weight in module.parameters() if weight.requires_grad]
        memory = pin(allocate(sum(_room(weight) for weight in self.weights)), device)
        self._on_host: dict[nn.Parameter, Tensor] = {}
        start = 0
        for weight in self.weights:
            place = memory[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
            self._on_host[weight] = place.copy_(weight.detach())
            weight.data = place
            start += _room(weight)
        self._on_device: dict[nn.Parameter, Tensor] = {}
        self._copied: Event = None
        self._leaving: list[tuple[Tensor, Event]] = []

    def prefetch(self) -> None:
        """Begin to copy the weights to the device, unless they are there."""
        if self._on_device:
            return
        before = self._copies.computed()
        for weight, place in self._on_host.items():
            self._on_device[weight] = torch.empty_like(place, device=self._device)
            self._copied = self._copies.copy(self._on_device[weight], place, before)

    def fetch(self) -> None:
        """Have the parameters hold weights on the device."""
        self.prefetch()
        self._copies.wait(self._copied)
        for weight, copy in self._on_device.items():
            weight.data = copy

    def hide(self) -> None:
        """Have the parameters hold nothing."""
        for weight in self.weights:
            weight.data = torch.empty(0, dtype=weight.dtype)

    def release(self) -> None:
        """Have all parameters hold the weights in host memory, as they were last put back there."""
        # Copies to and from memory that is freed here, of a block that was prefetched in vain too.
        for copied in (self._copied, *(copied for _, copied in self._leaving)):
            if copied is not None:
                self._copies.wait(copied)
        self._copied = None
        self._leaving.clear()
        self._on_device.clear()
        for weight, place in self._on_host.items():
            weight.data = place

    def put_back(self, weight: nn.Parameter) -> None:
        """Copy an updated weight to host memory, and release it."""
        copied = self._copies.copy(self._on_host[weight], weight.data, self._copies.computed())
        self._leaving.append((weight.data, copied))  # until `release`
        weight.data = self._on_host[weight]
        del self._on_device[weight]


class TrainedSwap:
    """The blocks of a component that wait."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        """Move trained weights of blocks to host memory.

        Args:
            blocks: in the order of the forward pass.
        """
        self._waiting = [WaitingBlock(block, device, copy_stream(device)) for block in blocks]
        self._index = {block: index for index, block in enumerate(blocks)}
        self._block_of = {weight: block for block in self._waiting for weight in block.weights}
        self._pass = ExitStack()
        """The forward pass of a block without gradients, while it goes on."""
        for block in blocks:
            block.register_forward_pre_hook(self._begin_pass)
            block.register_forward_hook(self._end_pass)

    def __contains__(self, weight: object) -> bool:
        return weight in self._block_of

    def checkpoint(self, block: nn.Module, *inputs: Any) -> Any:
        """Call a block and repeat its forward pass in the backward pass; a gradient checkpointing of diffusers."""
        index = self._index.get(block)
        if index is None:
            return checkpoint(block.__call__, *inputs, use_reentrant=False)
        return checkpoint(
            block.__call__,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (self._forward(index), self._recomputation(index)),
        )

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within this context the module that has the blocks can be moved without the weights that wait."""
        for block in self._waiting:
            block.hide()
        yield
        for block in self._waiting:
            block.release()

    def put_back(self, weight: nn.Parameter) -> None:
        """Return an updated weight to host memory, if it waits there."""
        if weight in self._block_of:
            self._block_of[weight].put_back(weight)

    def release(self) -> None:
        """Return all weights to host memory, at the end of a step: those that got no gradient are still away, and those
        of a block that failed.
        """
        self._pass.close()
        for block in self._waiting:
            block.release()

    def _begin_pass(self, block: nn.Module, inputs: Any) -> None:
        if not torch.is_grad_enabled():
            self._pass.enter_context(self._forward(self._index[block]))

    def _end_pass(self, block: nn.Module, inputs: Any, outputs: Any) -> None:
        if not torch.is_grad_enabled():
            self._pass.close()

    @contextmanager
    def _forward(self, index: int) -> Iterator[None]:
        self._waiting[index].fetch()
        if index + 1 < len(self._waiting):
            self._waiting[index + 1].prefetch()
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # or casts of all blocks would be kept until the forward pass ends
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)
            self._waiting[index].release()

    @contextmanager
    def _recomputation(self, index: int) -> Iterator[None]:
        if index + 1 < len(self._waiting):
            self._waiting[index + 1].release()  # it is behind; weights that got no gradient are still there
        self._waiting[index].fetch()
        if index:
            self._waiting[index - 1].prefetch()
        yield


def _room(weight: Tensor) -> int:
    """Return the bytes that a weight takes in the memory of its block: each begins on a multiple of 64."""
    return -(-weight.nbytes // 64) * 64

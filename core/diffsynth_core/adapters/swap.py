"""Frozen weights that wait in host memory and are copied to the device in time for the layers that need them.

Layers that are used together, such as those of a block, form a unit, which is copied in one piece: host to device only,
because frozen weights never change. Two buffers on the device take turns: while one unit computes, the next one is
copied, in the order of the pass before. The backward pass fetches each weight again (adapters/stored.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffsynth_core.adapters.stored import StoredLinear
from diffsynth_core.adapters.streams import CopyStream, Event, copy_stream
from diffsynth_core.config.choices import SWAP_BUFFERS
from diffsynth_core.host_memory import allocate, pin

ALIGNMENT = 256
"""Bytes; tensors on a device begin at multiples of it, for kernels that read many bytes at once."""

Tensors = Mapping[str, Tensor]
"""What keeps a weight, by the names of its format."""


class HostUnit:
    """The weights of some layers in one piece of host memory, once all of them are there."""

    def __init__(self, layers: Sequence[StoredLinear]) -> None:
        self._layers = tuple(layers)
        self._parts: dict[StoredLinear, Tensors] = {}
        self._places: dict[StoredLinear, dict[str, tuple[int, torch.Size, torch.dtype]]] = {}
        self.memory = torch.empty(0, dtype=torch.uint8)
        """All weights, uint8."""

    def fill(self, layer: StoredLinear, tensors: Tensors) -> None:
        """Set the weight of a layer, from tensors in host memory."""
        self._parts[layer] = tensors
        if len(self._parts) < len(self._layers):
            return
        size = 0
        for filled, parts in self._parts.items():
            self._places[filled] = {}
            for name, tensor in parts.items():
                self._places[filled][name] = size, tensor.shape, tensor.dtype
                size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.memory = allocate(size)
        for filled, views in self.views(self.memory).items():
            for name, view in views.items():
                view.copy_(self._parts[filled][name])
        self._parts.clear()

    def views(self, memory: Tensor) -> dict[StoredLinear, Tensors]:
        """Return the weights in memory that holds a copy of `memory`."""

        def view(start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
            size = math.prod(shape) * dtype.itemsize
            return memory[start : start + size].view(dtype).view(shape)

        return {layer: {name: view(*place) for name, place in places.items()} for layer, places in self._places.items()}


@dataclass(eq=False)
class _Buffer:
    """Device memory of a unit.

    `used`: when what computed with its memory last is done. `unit`: the one that it holds. `copied`: when it is there.
    """

    memory: Tensor
    used: Event
    unit: int | None = None
    weights: dict[StoredLinear, Tensors] = field(default_factory=dict)
    copied: Event = None


class FetchOrder:
    """Predicts which unit comes next: that of the pass before, or the neighbor in the direction of the last two."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._expected: list[int] = []
        self._seen: list[int] = []

    def begin(self) -> int | None:
        """Begin a pass, forward and backward; return its first unit, if it is known."""
        self._expected, self._seen = self._seen or self._expected, []
        return self._expected[0] if self._expected else None

    def enter(self, unit: int) -> int | None:
        """Return the unit after one that computes now; None at the end of a pass."""
        self._seen.append(unit)
        place = len(self._seen) - 1
        if self._expected[place : place + 1] == [unit]:
            return self._expected[place + 1] if place + 1 < len(self._expected) else None
        forward = place == 0 or self._seen[place - 1] < unit
        following = unit + 1 if forward else unit - 1
        return following if 0 <= following < self._count else None


class BlockSwap:
    """Units of layers whose weights wait in host memory.

    Until the first pass begins, the weights are used where they are.
    """

    def __init__(self, units: Sequence[Sequence[StoredLinear]]) -> None:
        """Have the layers fetch their weights here; all must be filled before they are used."""
        self._units = [HostUnit(layers) for layers in units]
        self._unit_of = {layer: number for number, layers in enumerate(units) for layer in layers}
        self._order = FetchOrder(len(units))
        self._buffers: list[_Buffer] = []
        self._current: _Buffer | None = None
        self._copies: CopyStream | None = None
        for layer in self._unit_of:
            layer.fetch_from(self)

    def fill(self, layer: StoredLinear, tensors: Tensors) -> None:
        """Set the weight of a layer, from tensors in host memory."""
        self._units[self._unit_of[layer]].fill(layer, tensors)

    @property
    def host_bytes(self) -> int:
        """Bytes that wait in host memory."""
        return sum(unit.memory.nbytes for unit in self._units)

    @property
    def device_bytes(self) -> int:
        """Bytes on the device."""
        return sum(buffer.memory.nbytes for buffer in self._buffers)

    def begin(self, device: torch.device, copies: CopyStream | None = None) -> None:
        """Begin a forward and a backward pass on a device, the same for all passes.

        Args:
            copies: None: those of the device.
        """
        if self._copies is None:
            self._copies = copies or copy_stream(device)
            for unit in self._units:
                unit.memory = pin(unit.memory, device)
            size = max(unit.memory.nbytes for unit in self._units)
            count = min(SWAP_BUFFERS, len(self._units))
            memories = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(count)]
            self._buffers = [_Buffer(memory, self._copies.computed()) for memory in memories]
        first = self._order.begin()
        if first is not None:
            self._prefetch(first)

    def fetch(self, layer: StoredLinear) -> Tensors:
        """Return what keeps the weight of a layer, on the device, until a layer of another unit is fetched."""
        number = self._unit_of[layer]
        if self._copies is None:
            unit = self._units[number]
            return unit.views(unit.memory)[layer]
        if self._current is None or self._current.unit != number:
            self._enter(number, self._copies)
        assert self._current
        return self._current.weights[layer]

    def _enter(self, number: int, copies: CopyStream) -> None:
        if self._current:
            self._current.used = copies.computed()
        buffer = self._holding(number) or self._copy(number)
        copies.wait(buffer.copied)
        self._current = buffer
        following = self._order.enter(number)
        if following is not None:
            self._prefetch(following)

    def _prefetch(self, number: int) -> None:
        if not self._holding(number):
            self._copy(number)

    def _holding(self, number: int) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.unit == number), None)

    def _copy(self, number: int) -> _Buffer:
        """Copy a unit over one that does not compute."""
        buffer = next(one for one in self._buffers if one is not self._current)
        if buffer.unit is not None:
            give_back(buffer.memory)
        unit, copies = self._units[number], self._copies
        assert copies
        buffer.unit, buffer.weights = number, unit.views(buffer.memory)
        buffer.copied = copies.copy(buffer.memory[: unit.memory.nbytes], unit.memory, buffer.used)
        return buffer


def give_back(memory: Tensor) -> None:
    """Called with device memory before another unit is copied over it; for tests that make a late use visible."""


def swaps_of(module: nn.Module) -> list[BlockSwap]:
    """Return the swaps that the layers of a module fetch from, each once."""
    sources = (layer.source for layer in module.modules() if isinstance(layer, StoredLinear))
    return list(dict.fromkeys(source for source in sources if isinstance(source, BlockSwap)))

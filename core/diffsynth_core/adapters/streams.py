"""Copies between host and device memory that run beside the computation.

A `CopyStream` queues copies and orders them with the computation by events. A test may implement it to record what is
ordered with what, which needs no accelerator.
"""

from abc import ABC, abstractmethod
from functools import cache
from typing import Any

import torch
from torch import Tensor

Event = Any
"""A point in the work of a device, such as the end of a copy."""


class CopyStream(ABC):
    """A queue of copies."""

    @abstractmethod
    def computed(self) -> Event:
        """Return the point at which all computation queued so far is done."""

    @abstractmethod
    def copy(self, target: Tensor, source: Tensor, after: Event) -> Event:
        """Queue a copy that begins after an event; return its end.

        Computation must `wait` for that before either tensor is freed: the allocator lends memory of the device again
        as soon as the computation queued so far is done.
        """

    @abstractmethod
    def wait(self, copied: Event) -> None:
        """Have computation that is queued from now on wait for the end of a copy."""


class ImmediateCopies(CopyStream):
    """Of devices without copies beside the computation: everything is done in the order in which it is asked for."""

    def computed(self) -> Event:
        return None

    def copy(self, target: Tensor, source: Tensor, after: Event) -> Event:
        target.copy_(source)

    def wait(self, copied: Event) -> None:
        pass


class AcceleratorCopies(CopyStream):
    """A stream of a GPU, beside the one that computes. Host memory must be pinned."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.Stream(device)

    def computed(self) -> Event:
        return torch.accelerator.current_stream(self._device).record_event()

    def copy(self, target: Tensor, source: Tensor, after: Event) -> Event:
        self._stream.wait_event(after)
        with self._stream:
            target.copy_(source, non_blocking=True)
        # No `record_stream`: it would keep freed memory until the copies queued by then are done, and the host, which
        # queues far ahead, would fill the device with blocks that are free already.
        return self._stream.record_event()

    def wait(self, copied: Event) -> None:
        torch.accelerator.current_stream(self._device).wait_event(copied)


@cache
def copy_stream(device: torch.device) -> CopyStream:
    """Return the copies of a device: one queue for all that is moved to it and from it."""
    return AcceleratorCopies(device) if device.type == "cuda" else ImmediateCopies()

"""Updating parameters one at a time: as soon as a gradient is there, or with a state that waits in host memory.

Both do what one optimizer of all parameters does, to the bit, if it updates each tensor by itself.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffsynth_core.host_memory import allocate, pin

WHOLE: Mapping[str, int] = MappingProxyType({})


class MakeOptimizer(Protocol):
    """Creates the optimizer of parameters by name."""

    def __call__(self, trained: Mapping[str, nn.Parameter], starts: Mapping[str, int] = WHOLE, /) -> Optimizer:
        """Create it.

        Args:
            starts: index of the first number of each parameter in the whole one, if they are parts of those.
        """


Options = dict[str, Any]


class PerParameterOptimizer(Optimizer):
    """Updates each parameter by an optimizer of its own.

    Groups and state are those of one optimizer of all parameters, so that either continues from what the other saved.

    Attributes:
        device: where parameters are updated; they may be elsewhere meanwhile.
    """

    def __init__(
        self,
        make: MakeOptimizer,
        trained: Mapping[str, nn.Parameter],
        device: torch.device,
        on_host: Collection[str] = (),
    ) -> None:
        """Take the groups of the optimizer that `make` creates of all parameters, and create one of each.

        Args:
            on_host: parameters whose state waits in host memory, and is on the device only while they are updated.
        """
        whole = make(trained)
        super().__init__(whole.param_groups, whole.defaults)
        self.device = device
        self._on_host = {parameter for name, parameter in trained.items() if name in on_host}
        self._parts = {parameter: make({name: parameter}) for name, parameter in trained.items()}
        self._group_of = {
            parameter: index for index, group in enumerate(self.param_groups) for parameter in group["params"]
        }
        self._before: list[Options] = []
        self._after: dict[int, Options] = {}

    def begin(self) -> None:
        """Begin a step with the options that the groups have now."""
        # Each parameter is updated with them: some optimizers count steps in their group, once for all its parameters.
        self._before = [_options(group) for group in self.param_groups]
        self._after = {}

    def state_waits(self, parameter: nn.Parameter) -> bool:
        """Return whether the state of a parameter waits in host memory."""
        return parameter in self._on_host

    @torch.no_grad()
    def update(self, parameter: nn.Parameter) -> None:
        """Update one parameter, whose gradient stays."""
        part, index = self._parts[parameter], self._group_of[parameter]
        kept, waits = self.state[parameter], self.state_waits(parameter)
        state = _copies(kept, self.device) if waits else kept
        part.state = defaultdict(dict, {parameter: state})
        part.param_groups = [{**self._before[index], "params": [parameter]}]
        part.step()
        self._after[index] = _options(part.param_groups[0])
        updated = part.state.pop(parameter)
        self.state[parameter] = _put_back(updated, kept, self.device) if waits else updated

    def finish(self) -> None:
        """End the step: what the updates made of the options holds for the next one."""
        for index, options in self._after.items():
            self.param_groups[index].update(options)
        if self._on_host and self.device.type != "cpu":
            torch.accelerator.synchronize()  # what is copied to host memory may be saved from now on

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        self.begin()
        for parameter in self._parts:
            if parameter.grad is not None:
                self.update(parameter)
        self.finish()
        return None


def host_copy(value: Tensor, device: torch.device) -> Tensor:
    """Return a copy in host memory, which is pinned if the device is an accelerator."""
    memory = pin(allocate(value.nbytes), device) if value.nbytes else torch.empty(0, dtype=torch.uint8)
    return memory.view(value.dtype).view(value.shape).copy_(value)


def is_moved(value: Any) -> bool:
    """Return whether an entry of the state waits in host memory: not numbers, nor counters, which optimizers keep where
    they need them.
    """
    return isinstance(value, Tensor) and value.dim() > 0


def _options(group: Mapping[str, Any]) -> Options:
    return {name: value for name, value in group.items() if name != "params"}


def _copies(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the state on the device, always in memory of its own."""
    return {
        kind: torch.empty_like(value, device=device).copy_(value, non_blocking=True) if is_moved(value) else value
        for kind, value in state.items()
    }


def _put_back(state: Mapping[str, Any], kept: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the state in host memory: that which it was copied from, where there is one."""
    result: dict[str, Any] = {}
    for kind, value in state.items():
        before = kept.get(kind)
        if not is_moved(value):
            result[kind] = value
        elif is_moved(before) and (before.shape, before.dtype) == (value.shape, value.dtype):  # type: ignore[union-attr]
            result[kind] = before.copy_(value, non_blocking=True)  # type: ignore[union-attr]
        else:
            result[kind] = host_copy(value, device)
    return result

"""Muon for matrices, AdamW for everything else, as one optimizer."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer


class MuonWithAdamW(Optimizer):
    """Two parameter groups, stepped by two optimizers that share the state of this one: Muon orthogonalizes the update
    of a matrix and is not defined for other shapes.
    """

    def __init__(
        self, trained: Iterable[nn.Parameter], muon: Mapping[str, Any], adamw: Mapping[str, Any], **shared: Any
    ) -> None:
        """Split the parameters; `muon` and `adamw` are options of one of both, `shared` those of both."""
        parameters = list(trained)
        kinds: list[tuple[type[Optimizer], Mapping[str, Any], list[nn.Parameter]]] = [
            (Muon, muon, [parameter for parameter in parameters if is_matrix(parameter.shape)]),
            (AdamW, adamw, [parameter for parameter in parameters if not is_matrix(parameter.shape)]),
        ]
        self._parts = [kind(members, **options, **shared) for kind, options, members in kinds if members]
        groups = [group for part in self._parts for group in part.param_groups]
        super().__init__(groups, {**muon, **adamw, **shared})

    def _share(self) -> None:
        """Let the parts work on the groups and the state of this optimizer, which may be replaced from outside."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters."""
        self._share()
        for part in self._parts:
            part.step()
        return None


def is_matrix(shape: tuple[int, ...] | torch.Size) -> bool:
    """Return whether Muon updates a tensor of this shape."""
    return len(shape) == 2

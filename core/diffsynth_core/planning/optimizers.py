"""Table of the optimizers: how each is created, and what it takes in memory. Creating one imports torch."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffsynth_core.config.parameters import Parameters

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """An optimizer, and the bytes that it takes for each trained number.

    Attributes:
        build: creates it, with the options of the run, for trained parameters.
        state_bytes: of its state, in memory and in the saved state of a run.
        update_bytes: of what its step works with, by device: cpu, or cuda for all accelerators.
    """

    build: Callable[[Parameters, Iterable["nn.Parameter"]], "Optimizer"]
    state_bytes: int
    update_bytes: Mapping[str, int]


def _adamw(params: Parameters, trained: Iterable["nn.Parameter"]) -> "Optimizer":
    from torch.optim import AdamW

    return AdamW(trained, lr=params.learning_rate, betas=params.adam_betas, weight_decay=params.weight_decay)


OPTIMIZERS: dict[str, OptimizerSpec] = {
    # Two moments in float32. On accelerators its step takes the roots of all second moments at once, on the CPU those
    # of one tensor (torch/optim/adam.py, `_multi_tensor_adam`, the default there).
    "adamw": OptimizerSpec(build=_adamw, state_bytes=8, update_bytes={"cpu": 0, "cuda": 4}),
}
"""Name -> optimizer."""

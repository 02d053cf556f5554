"""An exponential moving average (EMA) of the trained weights, as one more tensor of the optimizer's state.

Iterates of stochastic gradient descent scatter around a minimum, and their average is closer to it (Polyak and Juditsky
1992). It is computed number by number, so an engine shards, offloads, saves and restores it like any moment.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from diffsynth_core.optimizers.names import AVERAGE, UPDATE


class AveragedOptimizer(Optimizer):
    """Updates weights as another optimizer does, and then their averages, in float32.

    After step n, counted from 0, the average is `decay * average + (1 - decay) * weight`, with the decay of `decay_of`.
    A weight without a gradient is not updated, nor is its average; nor are both in a step that float16 scaling skips.
    """

    def __init__(self, optimizer: Optimizer, decay: float) -> None:
        """Take over the groups of an optimizer.

        Args:
            decay: the largest share of the previous average in the next one, between 0 and 1.
        """
        super().__init__([{UPDATE: 0, **group} for group in optimizer.param_groups], optimizer.defaults)
        self._optimizer, self._decay = optimizer, decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient, and their averages."""
        # Both are replaced from outside where an engine updates some parameters at a time.
        self._optimizer.param_groups, self._optimizer.state = self.param_groups, self.state
        self._optimizer.step()
        for group in self.param_groups:
            updated = [parameter for parameter in group["params"] if parameter.grad is not None]
            self._average(updated, decay_of(group[UPDATE], self._decay))
        return None

    def _average(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        averages, wide = [], []
        for parameter in parameters:
            state: dict[str, Any] = self.state[parameter]
            if AVERAGE not in state:
                state[AVERAGE] = parameter.detach().to(torch.float32, copy=True)
            elif parameter.dtype == torch.float32:
                averages.append(state[AVERAGE])
                wide.append(parameter.detach())
            else:  # one at a time, because of the copy
                _move([state[AVERAGE]], [parameter.detach().float()], decay)
        if averages:
            _move(averages, wide, decay)


def decay_of(step: int, most: float) -> float:
    """Return the decay of averages in a step, counted from 0: `(1 + step) / (10 + step)`, and at most `most`.

    So the average forgets the first weights early. The formula is that of diffusers' `EMAModel` as its training scripts
    use it (without `use_ema_warmup`), from `tf.train.ExponentialMovingAverage`. There too the first average is the
    weights after the first step.
    """
    return min(most, (1 + step) / (10 + step))


def _move(averages: list[Tensor], weights: list[Tensor], decay: float) -> None:
    get_ema_multi_avg_fn(decay)(averages, weights, None)  # type: ignore[no-untyped-call]


def average_of(optimizer: Optimizer, parameter: Tensor) -> Tensor:
    """Return the average of a parameter that an optimizer keeps; before its first update, the parameter itself."""
    average: Tensor = optimizer.state.get(parameter, {}).get(AVERAGE, parameter)
    return average.detach()


@contextmanager
def averages_in_place(optimizer: Optimizer) -> Iterator[None]:
    """Within this context parameters are their averages, in the dtype of the parameter, rounded to nearest; after it
    they are what they were, to the bit.

    Takes a copy of the parameters, where they are.
    """
    kept: dict[nn.Parameter, Tensor] = {}
    try:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            kept[parameter] = parameter.detach().clone()
            parameter.data.copy_(average_of(optimizer, parameter))
        yield
    finally:
        for parameter, weight in kept.items():
            parameter.data.copy_(weight)

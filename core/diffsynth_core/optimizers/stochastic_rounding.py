"""Training weights in bfloat16: each update is computed in float32 and rounded stochastically.

bfloat16 has 8 bits of precision: rounded to nearest, most updates of a small learning rate are lost. Rounded up with
the probability of the distance to the lower neighbor, they arrive on average (Gupta et al. 2015, arXiv:1502.02551).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffsynth_core.optimizers.names import UPDATE
from diffsynth_core.optimizers.per_parameter import WHOLE
from diffsynth_core.randomness import key_of

CHUNK = 1 << 22
"""Numbers that are rounded at once, which bounds the memory for it."""
LANES = 4
"""16-bit random numbers in one of 64 bits."""

BuildOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


class RoundedOptimizer(Optimizer):
    """Updates bfloat16 parameters in float32, one after the other, and rounds them; other parameters as usual.

    Each bfloat16 parameter has an optimizer of its own, which works on a float32 copy that exists during its update
    alone. Its state is that of this optimizer for the parameter, and its options are a parameter group here.
    """

    def __init__(
        self, build: BuildOptimizer, trained: Mapping[str, nn.Parameter], seed: int, starts: Mapping[str, int] = WHOLE
    ) -> None:
        """Split the parameters by dtype.

        Args:
            build: creates the optimizer of some of the parameters.
            trained: parameters by name; the random numbers of one depend on its name, the seed and the step.
            starts: index of the first number of each parameter in the whole one, if they are parts of those.
        """
        self._seed, self._starts = seed, starts
        self._rounded = {name: weight for name, weight in trained.items() if weight.dtype == torch.bfloat16}
        # A stand-in has the shape of its parameter, which some optimizers look at, and the memory of one number.
        self._copies = [nn.Parameter(_blank(weight)) for weight in self._rounded.values()]
        self._parts = [build([copy]) for copy in self._copies]
        groups = [
            {**part.param_groups[0], "params": [weight], UPDATE: 0}
            for part, weight in zip(self._parts, self._rounded.values(), strict=True)
        ]
        others = [weight for name, weight in trained.items() if name not in self._rounded]
        self._rest = build(others) if others else None
        groups += [{**group, UPDATE: 0} for group in (self._rest.param_groups if self._rest else ())]
        super().__init__(groups, dict(self._parts[0].defaults))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters."""
        count = len(self._parts)
        own = zip(self._rounded.items(), self._copies, self._parts, self.param_groups[:count], strict=True)
        for (name, weight), copy, part, group in own:
            if weight.grad is None:
                continue
            copy.data, copy.grad = weight.float(), weight.grad.float()
            _step(part, defaultdict(dict, {copy: self.state[weight]}), [(group, [copy])])
            key = key_of(self._seed, "rounding", group[UPDATE], name)
            round_stochastically(copy.data, key, out=weight, start=self._starts.get(name, 0))
            copy.data, copy.grad = _blank(weight), None
        if self._rest:
            _step(self._rest, self.state, [(group, group["params"]) for group in self.param_groups[count:]])
        return None


def _step(
    part: Optimizer, state: defaultdict[Tensor, Any], groups: Iterable[tuple[dict[str, Any], list[nn.Parameter]]]
) -> None:
    """Step an optimizer with options and state that are kept elsewhere, and keep what it made of the options."""
    known = list(groups)
    part.state = state
    part.param_groups = [{**group, "params": members} for group, members in known]
    part.step()
    for (group, _), used in zip(known, part.param_groups, strict=True):
        group.update({option: value for option, value in used.items() if option != "params"})


def _blank(weight: Tensor) -> Tensor:
    """Return float32 zeros of a tensor's shape in the memory of one number."""
    return torch.zeros((), device=weight.device).expand(weight.shape)


@torch.no_grad()
def round_stochastically(values: Tensor, key: int, out: Tensor, start: int = 0) -> None:
    """Round float32 numbers to one of the two nearest bfloat16 ones, up with the probability of the distance from the
    lower one, so that the result is right on average. What is not finite stays as it is.

    The random number of each is a function of key and index alone: the same on every device, and for a part as in the
    whole.

    Args:
        values: float32, of any shape.
        out: bfloat16, of the same shape.
        start: index of the first value in the whole tensor, if this is a part of it.
    """
    source, target = values.reshape(-1), out.view(-1)
    for first in range(0, len(source), CHUNK):
        part = source[first : first + CHUNK]
        bits = part.view(torch.int32) + _random_16_bits(key, start + first, len(part), part.device)
        # bfloat16 is the upper half of float32; adding to the lower half carries with the probability of its share.
        rounded = (bits >> 16).to(torch.int16).view(torch.bfloat16)
        target[first : first + CHUNK] = torch.where(part.isfinite(), rounded, part.to(torch.bfloat16))


def _random_16_bits(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Return uniform integers below 2^16 as int32: the lanes of SplitMix64 at these indices (`randomness._mix`)."""
    first, last = start // LANES, (start + count - 1) // LANES
    # int64 wraps around, as the algorithm wants it.
    state = torch.arange(first, last + 1, device=device).mul_(_signed(0x9E3779B97F4A7C15)).add_(_signed(key))
    state ^= _shifted(state, 30)
    state *= _signed(0xBF58476D1CE4E5B9)
    state ^= _shifted(state, 27)
    state *= _signed(0x94D049BB133111EB)
    state ^= _shifted(state, 31)
    lanes = state.view(torch.int16)[start - first * LANES :][:count]
    return lanes.to(torch.int32) & 0xFFFF


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Return a logical shift to the right; that of int64 is arithmetic."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """Return 64 bits as a signed integer."""
    return value - (1 << 64) if value >= 1 << 63 else value

"""Several LoRAs as one: w_1 D_1 + w_2 D_2 … is the product of their factors side by side, so ranks add.

Nothing is lost in that. A lower rank takes the nearest change of that rank, and says what is lost.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from safetensors import safe_open

from diffsynth_core.adapters.changes import Factors, add_factors, finite, lora_factors
from diffsynth_core.adapters.merge import RelativeError, truncate
from diffsynth_core.conversion.add_plan import SummedModule, SumPlan, output_of
from diffsynth_core.conversion.merging import as_bytes
from diffsynth_core.conversion.provenance import InputHashes
from diffsynth_core.progress import Reporter
from diffsynth_core.weights.dtypes import torch_dtype
from diffsynth_core.weights.weight_writer import Pieces, write_outputs


@dataclass
class SumResult:
    """What a lower rank loses: of all modules together, and of each."""

    loss: RelativeError
    losses: dict[str, RelativeError] = field(default_factory=dict)


def add_loras(plan: SumPlan, hashes: InputHashes, reporter: Reporter, overwrite: bool = False) -> SumResult:
    """Carry out a plan. `hashes`: of its inputs, started already.

    Raises:
        FaultsFound: as `output_problems` tells, before anything is written.
        DiffSynthError: as `write_outputs`; when a value is no finite number.
    """
    with ExitStack() as opened:
        summing = _Summing(plan, opened)
        write_outputs([output_of(plan, summing.sources(), hashes)], plan.inputs, reporter, overwrite)
    total = RelativeError()
    for loss in summing.losses.values():
        total.add(loss)
    return SumResult(total, summing.losses)


class _Summing:
    """The factors of the result, module by module."""

    def __init__(self, plan: SumPlan, opened: ExitStack) -> None:
        self._plan = plan
        self._streams = [opened.enter_context(safe_open(one.path, framework="pt")) for one in plan.files]
        self._last: tuple[str, Factors] | None = None
        self.losses: dict[str, RelativeError] = {}

    def sources(self) -> dict[str, Pieces]:
        """What makes the bytes of each tensor of the result."""
        found: dict[str, Pieces] = {}
        for module in self._plan.modules:
            keys = module.keys
            assert keys.down and keys.up
            found[keys.down] = partial(self._half, module, "down")
            found[keys.up] = partial(self._half, module, "up")
            if keys.alpha:
                found[keys.alpha] = partial(_alpha, module)
        return found

    def _half(self, module: SummedModule, half: str) -> Iterator[memoryview]:
        """The bytes of A or B; both come of one computation."""
        if self._last is None or self._last[0] != module.name:
            self._last = (module.name, self._factors(module))
        value = getattr(self._last[1], half).to(torch_dtype(self._plan.dtype))
        yield as_bytes(finite(value, self._plan.output, module.name).contiguous())

    def _factors(self, module: SummedModule) -> Factors:
        changes = []
        for part in module.parts:
            weight, stream = self._plan.files[part.file].weight, self._streams[part.file]
            changes.append(lora_factors(part.lora, stream).scaled(weight))
        whole = add_factors(changes)
        if self._plan.rank is None:
            return whole
        nearest, self.losses[module.name] = truncate(whole, module.rank)
        return whole if whole.rank == module.rank else nearest


def _alpha(module: SummedModule) -> Iterator[memoryview]:
    """An alpha that makes the scale 1: that of each file is in B."""
    yield as_bytes(torch.tensor(float(module.rank)))

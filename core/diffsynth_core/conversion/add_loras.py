"""Several LoRAs as one: w_1 D_1 + w_2 D_2 + … is the product of their A and B side by side, so ranks add up.

This is exact. A lower rank takes the nearest change of that rank, and reports its error.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from safetensors import safe_open

from diffsynth_core.adapters.deltas import WeightDelta, add_deltas, finite, module_delta
from diffsynth_core.adapters.merge import RelativeError, truncate
from diffsynth_core.conversion.add_plan import AddPlan, SummedModule, output_of
from diffsynth_core.conversion.merging import as_bytes
from diffsynth_core.conversion.provenance import InputHashes
from diffsynth_core.progress import Reporter
from diffsynth_core.weights.dtypes import torch_dtype
from diffsynth_core.weights.weight_writer import Pieces, write_outputs


@dataclass
class AddResult:
    """The error of a lower rank: over all modules, and of each."""

    error: RelativeError
    errors: dict[str, RelativeError] = field(default_factory=dict)


def add_loras(plan: AddPlan, hashes: InputHashes, reporter: Reporter, overwrite: bool = False) -> AddResult:
    """Carry out a plan. `hashes`: of its inputs, started already.

    Raises:
        FaultsFound: as `output_problems`, before anything is written.
        DiffSynthError: as `write_outputs`; when a value is not finite.
    """
    with ExitStack() as opened:
        adding = _Adding(plan, opened)
        write_outputs([output_of(plan, adding.sources(), hashes)], plan.inputs, reporter, overwrite)
    total = RelativeError()
    for error in adding.errors.values():
        total.add(error)
    return AddResult(total, adding.errors)


class _Adding:
    """The tensors of the result, module by module."""

    def __init__(self, plan: AddPlan, opened: ExitStack) -> None:
        self._plan = plan
        self._streams = [opened.enter_context(safe_open(one.lora.path, framework="pt")) for one in plan.loras]
        self._last: tuple[str, WeightDelta] | None = None
        self.errors: dict[str, RelativeError] = {}

    def sources(self) -> dict[str, Pieces]:
        """The functions that make the bytes of each tensor of the result."""
        found: dict[str, Pieces] = {}
        for module in self._plan.modules:
            keys = module.keys
            assert keys.A and keys.B
            found[keys.A] = partial(self._matrix, module, "A")
            found[keys.B] = partial(self._matrix, module, "B")
            if keys.alpha:
                found[keys.alpha] = partial(_alpha, module)
        return found

    def _matrix(self, module: SummedModule, name: Literal["A", "B"]) -> Iterator[memoryview]:
        """The bytes of A or B; one computation gives both."""
        if self._last is None or self._last[0] != module.name:
            self._last = (module.name, self._delta(module))
        value = getattr(self._last[1], name).to(torch_dtype(self._plan.dtype))
        yield as_bytes(finite(value, self._plan.output, module.name).contiguous())

    def _delta(self, module: SummedModule) -> WeightDelta:
        whole = add_deltas(
            [
                module_delta(part.lora, self._streams[part.file]).scaled(self._plan.loras[part.file].weight)
                for part in module.parts
            ]
        )
        if self._plan.rank is None:
            return whole
        nearest, self.errors[module.name] = truncate(whole, module.rank)
        return whole if whole.rank == module.rank else nearest


def _alpha(module: SummedModule) -> Iterator[memoryview]:
    """An alpha that makes the scale 1: B contains that of each file."""
    yield as_bytes(torch.tensor(float(module.rank)))

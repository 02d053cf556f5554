"""How often a step waits for the device: whatever brings a number of a tensor to Python waits for all that was queued
before.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffsynth_core.config.resolve import resolve
from diffsynth_core.planning.plan import make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.engines.replicated import ReplicatedEngine
from diffsynth_core.training.loop import train
from diffsynth_core.training.observers.observer import Observer, StepReport

STEPS = 3
LORA = {"recipe": "qwen-image-lora", "lora_rank": 4, "max_grad_norm": 0.1}
KINDS = {
    "lora": {**LORA, "batch_size": 2},
    "lora, accumulated": {**LORA, "gradient_accumulation_steps": 4},
    "full, accumulated": {"recipe": "qwen-image-full", "max_grad_norm": 0.1, "gradient_accumulation_steps": 4},
    "full, fused": {"recipe": "qwen-image-full", "fused_backward": True},
}


class _Lists(TorchFunctionMode):
    """Counts reads of whole tensors, which call no operator on a CPU."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.tolist, Tensor.numpy, Tensor.cpu):
            self._waits.append(function.__name__)
        return function(*args, **(kwargs or {}))


class _Scalars(TorchDispatchMode):
    """Counts reads of scalars, apart from counters of optimizers, which torch keeps on the host."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self._waits = waits
        self.counters: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].data_ptr() not in self.counters:
            self._waits.append("scalar")
        return function(*args, **(kwargs or {}))


class _ByStep(Observer):
    """Takes the waits of each step at its end."""

    def __init__(self, waits: list[str]) -> None:
        self._waits = waits
        self.of_steps: list[list[str]] = []

    def on_step(self, report: StepReport) -> None:
        self.of_steps.append(self._waits.copy())
        self._waits.clear()


def waits_of_steps(monkeypatch: pytest.MonkeyPatch, tiny_models: Path, out: Path, **given: object) -> list[list[str]]:
    """What waited in each step but the first, which includes loading."""
    flags = {"max_steps": STEPS, "dataset_repeat": 8, "num_epochs": 1, "device": "cpu", "dataset_num_workers": 0,
             "save_steps": STEPS, "output_path": str(out), **given}  # fmt: skip
    plan = make_plan(resolve(flags), SilentReporter(), base=tiny_models)
    waits: list[str] = []
    scalars, by_step = _Scalars(waits), _ByStep(waits)
    begin = ReplicatedEngine.begin

    def with_counters(self: ReplicatedEngine, rate: float, number: int) -> None:
        scalars.counters |= {state["step"].data_ptr() for state in self._plain.state.values()}
        begin(self, rate, number)

    monkeypatch.setattr(ReplicatedEngine, "begin", with_counters)
    with _Lists(waits), scalars:
        train(plan, SilentReporter(), StopRequest(), observers=[by_step])
    assert len(by_step.of_steps) == STEPS
    return by_step.of_steps[1:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_the_device_once(tiny_models, photographs, tmp_path, monkeypatch, kind):
    """For loss, gradient norm and stop flag together."""
    given = {**KINDS[kind], "dataset_base_path": str(photographs)}
    waits = waits_of_steps(monkeypatch, tiny_models, tmp_path / "out", **given)
    assert waits == [["tolist"]] * (STEPS - 1)

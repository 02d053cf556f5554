"""The seams of the loop: an engine and an observer from outside, without a change in the loop."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from diffsynth_core.config.resolve import resolve
from diffsynth_core.planning.plan import make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.engines import make_engine
from diffsynth_core.training.engines.engine import Engine
from diffsynth_core.training.engines.replicated import ReplicatedEngine
from diffsynth_core.training.loop import train
from diffsynth_core.training.observers.observer import Observer, StepReport


@pytest.fixture
def run(tiny_models: Path, photographs: Path, tmp_path: Path):
    """Train a LoRA of two steps in a folder of this name, with an engine and observers."""

    def run(name: str, open_engine=make_engine, observers=(), **more: object) -> Path:
        flags = {"recipe": "qwen-image-lora", "dataset_base_path": str(photographs), "max_steps": 2, "device": "cpu",
                 "dataset_num_workers": 0, "lora_rank": 4, "output_path": str(tmp_path / name), **more}  # fmt: skip
        plan = make_plan(resolve(flags), SilentReporter(), base=tiny_models)
        train(plan, SilentReporter(), StopRequest(), open_engine=open_engine, observers=observers)
        return tmp_path / name

    return run


class Counting(Engine):
    """An engine made of another: it counts what the loop asks of it."""

    calls: ClassVar[list[str]] = []
    placed: ClassVar[set[tuple[int, str]]] = set()

    def __init__(self, plan, accelerator) -> None:
        self._inner = ReplicatedEngine(accelerator, plan.parameters.max_grad_norm)

    def _called(self, name: str, *arguments: object):
        Counting.calls.append(name)
        return getattr(self._inner, name)(*arguments)

    def place(self, component, name, tensor):
        if not any(owner == id(component) for owner, _ in Counting.placed):
            assert all(parameter.is_meta for parameter in component.parameters())
            assert any(".lora_B." in name for name, _ in component.named_parameters())
            assert component.is_gradient_checkpointing
        Counting.placed.add((id(component), name))
        self._inner.place(component, name, tensor)

    def prepare(self, model, make_optimizer):
        for component in model.components.values():
            assert {(id(component), name) for name, _ in component.named_parameters()} <= Counting.placed
        return self._called("prepare", model, make_optimizer)

    def try_out(self, micro_batch, reserved):
        return self._called("try_out", micro_batch, reserved)

    def evaluate(self, micro_batch):
        return self._called("evaluate", micro_batch)

    def forward_backward(self, micro_batch, weight, last):
        return self._called("forward_backward", micro_batch, weight, last)

    def sum_over_processes(self, values):
        return self._called("sum_over_processes", values)

    def gradient_norm(self):
        return self._called("gradient_norm")

    @property
    def skips_overflow(self):
        return self._inner.skips_overflow

    def begin(self, rate, number):
        return self._called("begin", rate, number)

    def step(self):
        return self._called("step")

    @property
    def updating(self):
        return self._inner.updating

    @property
    def gathers(self):
        return self._inner.gathers

    def whole(self, tensor):
        return self._inner.whole(tensor)

    def average(self, tensor):
        return self._inner.average(tensor)

    def averaged(self):
        return self._called("averaged")

    def state(self):
        return self._called("state")

    def scaler_state(self):
        return self._inner.scaler_state()

    def restore(self, saved):
        return self._called("restore", saved)

    def wait(self):
        return self._inner.wait()


class Losses(Observer):
    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.saved: list[tuple[str, int]] = []
        self.ended = 0

    def on_step(self, report: StepReport) -> None:
        self.reports.append(report)

    def on_save(self, path: Path, step: int) -> None:
        self.saved.append((path.name, step))

    def on_end(self) -> None:
        self.ended += 1


def test_an_engine_from_outside_trains_and_resumes(run):
    Counting.calls.clear()
    plain = load_file(run("plain") / "epoch-0.safetensors")
    own = load_file(run("own", Counting) / "epoch-0.safetensors")
    assert all(torch.equal(plain[name], own[name]) for name in plain)
    step = ["begin", "forward_backward", "sum_over_processes", "gradient_norm", "step"]
    trial = ["try_out", "sum_over_processes"]
    assert Counting.calls == ["prepare", *trial, *step, *step, "state"]
    run("own", Counting, resume="auto", max_steps=3)
    assert Counting.calls[14:] == ["prepare", "restore", *trial, *step, "state"]


def test_an_observer_from_outside_sees_steps_saves_and_the_end(run):
    seen = Losses()
    folder = run("seen", observers=[seen])
    written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(report.step, report.loss) for report in seen.reports] == [(line["step"], line["loss"]) for line in written]
    assert (seen.saved, seen.ended) == ([("epoch-0.safetensors", 2)], 1)

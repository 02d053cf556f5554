"""The tables of training: a row from outside trains, without a change in the loop, the engine or the objectives."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffsynth_core.config.resolve import resolve
from diffsynth_core.models.registry import load_family
from diffsynth_core.planning.memory.disk import state_bytes
from diffsynth_core.planning.memory.estimate import device_memory
from diffsynth_core.planning.memory.memory_config import memory_config
from diffsynth_core.planning.memory.sizes import find_workload
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.planning.training.optimizer_choice import OptimizerChoice
from diffsynth_core.planning.training.optimizers import OPTIMIZERS, OptimizerSpec, on_accelerators, per_number
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.loop import train
from diffsynth_core.training.losses import LOSSES
from diffsynth_core.training.objective import timestep_weights
from diffsynth_core.training.schedules import SCHEDULES
from diffsynth_core.training.timesteps import TIMESTEPS


@pytest.fixture
def plan(tiny_models: Path, photographs: Path, tmp_path: Path) -> Callable[..., RunPlan]:
    """The plan of a LoRA in a folder of this name, with `rows`, such as `loss`, chosen in the tables."""

    def plan(folder: str, steps: int = 4, resume: str | None = None, **rows: object) -> RunPlan:
        flags = {"recipe": "qwen-image-lora", "dataset_base_path": str(photographs), "max_steps": steps, "lora_rank": 4,
                 "device": "cpu", "dataset_num_workers": 0, "learning_rate": 0.01, "resume": resume,
                 "output_path": str(tmp_path / folder)}  # fmt: skip
        made = make_plan(resolve(flags), SilentReporter(), base=tiny_models)
        return replace(made, training=replace(made.training, **rows))

    return plan


def run(plan: RunPlan) -> tuple[list[float], Path]:
    """Train; return the losses of all steps and the folder."""
    folder = train(plan, SilentReporter(), StopRequest()).folder
    return metrics(folder, "loss"), folder


def metrics(folder: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Restless(torch.optim.Optimizer):
    """Moves against the sign of an average, by a rate that falls with what it counts: for each weight as a number and
    a tensor without dimensions, for all together in its group."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 1.0, "decays": (0.9, 0.5), "seen": 0})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            group["seen"] += 1
            group["decays"] = (group["decays"][0], group["decays"][1] * 0.99)
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state.update(count=0, drift=0.0, largest=torch.zeros(()), average=torch.zeros_like(weight))
                state["count"] += 1
                state["drift"] += 0.1 / state["count"]
                state["largest"] = torch.maximum(state["largest"], weight.grad.abs().max())
                state["average"].lerp_(weight.grad, group["decays"][1])
                pace = group["lr"] * (1 + state["drift"] + float(state["largest"])) / group["seen"]
                weight.add_(state["average"].sign(), alpha=-pace)


@pytest.fixture
def restless(monkeypatch) -> OptimizerChoice:
    spec = OptimizerSpec(
        title="Restless",
        build=lambda rate, options, trained: Restless(trained),
        state_bytes=per_number(4),
        update_bytes=on_accelerators(16),
    )
    monkeypatch.setitem(OPTIMIZERS, "restless", spec)
    return OptimizerChoice("restless")


def test_an_optimizer_with_numbers_in_its_state_resumes_bit_for_bit(plan, restless):
    losses, through = run(plan("through", optimizer=restless))
    run(plan("pieces", steps=2, optimizer=restless))
    again, pieces = run(plan("pieces", resume="auto", optimizer=restless))
    assert losses == again and losses != run(plan("adamw"))[0]
    for name in ("epoch-0.safetensors", "state/step-4/optimizer.safetensors", "state/step-4/trained.safetensors"):
        one, other = load_file(through / name), load_file(pieces / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    one, other = (json.loads((folder / "state/step-4/state.json").read_text()) for folder in (through, pieces))
    assert one["optimizer"] == other["optimizer"]
    assert one["optimizer"]["groups"] == [{"decays": [0.9, 0.5 * 0.99**4], "seen": 4}]


def test_an_optimizer_is_estimated_by_its_row(plan, restless):
    usual, own = plan("usual"), plan("own", optimizer=restless)
    numbers = state_bytes(usual) // 12
    assert state_bytes(own) == 8 * numbers

    def estimate(each):
        config = replace(memory_config(each, find_workload(each).largest), device="cuda")
        return device_memory(each, config).training

    before, after = map(estimate, (usual, own))
    assert (before.optimizer, after.optimizer) == (8 * numbers, 4 * numbers)
    assert (before.update, after.update) == (4 * numbers, 16 * numbers)


def test_a_timestep_sampler_from_outside_draws(plan, monkeypatch):
    """The noisiest timestep has weight 0, and the range comes from the parameters."""
    drawn = []
    monkeypatch.setitem(TIMESTEPS, "noisiest", lambda key, indices: drawn.append((key[:2], indices)) or indices[0])
    assert timestep_weights(load_family("qwen-image").sigmas())[0] == 0
    assert run(plan("out", timesteps="noisiest"))[0] == [0, 0, 0, 0]
    assert drawn == [((0, 0), range(1000))] * 5, "once in the trial before the steps"


def test_a_loss_from_outside_is_minimized(plan, monkeypatch):
    """Half of the squared error: the first loss and gradient are half as large."""
    monkeypatch.setitem(LOSSES, "half", lambda error: error.pow(2) / 2)
    (whole, plain), (half, own) = run(plan("plain")), run(plan("own", loss="half"))
    assert half[0] == pytest.approx(whole[0] / 2)
    assert metrics(own, "grad_norm")[0] == pytest.approx(metrics(plain, "grad_norm")[0] / 2, rel=1e-5)


def test_a_schedule_from_outside_sets_the_learning_rate(plan, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "stairs", lambda progress: 1 if progress < 0.5 else 0.25)
    made = plan("out")
    made = replace(made, parameters=made.parameters.model_copy(update={"lr_scheduler": "stairs"}))
    assert metrics(run(made)[1], "lr") == [0.01, 0.01, 0.0025, 0.0025]

"""Weights updated in the backward pass, and optimizers with their state in host memory, against the plain run."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffsynth_core.config.resolve import resolve
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.planning.memory.estimate import device_memory, host_memory
from diffsynth_core.planning.memory.memory_config import memory_config
from diffsynth_core.planning.memory.sizes import find_workload
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.engines.fused import FusedEngine
from diffsynth_core.training.loop import train
from diffsynth_core.training.model import TrainingModule
from tests.covering import long_ones
from tests.parity.float8_runs import plan_step

FUSED, ON_HOST = {"fused_backward": True}, {"enable_optimizer_cpu_offload": True}
WAYS = {"fused": FUSED, "on host": ON_HOST, "fused, on host": FUSED | ON_HOST}
KINDS = {
    "lora": {"recipe": "qwen-image-lora", "lora_rank": 4, "learning_rate": 0.01},
    "full": {"recipe": "qwen-image-full", "learning_rate": 1e-3},
}
LAST = 8


@pytest.fixture
def plan(tiny_models: Path, photographs: Path, tmp_path: Path) -> Callable[..., RunPlan]:
    """Plan a run in a folder of this name."""

    def plan(folder: str, **flags: object) -> RunPlan:
        given = {"dataset_base_path": str(photographs), "max_steps": LAST, "dataset_repeat": 2, "num_epochs": 1,
                 "device": "cpu", "dataset_num_workers": 0, "save_steps": LAST,
                 "output_path": str(tmp_path / folder)}  # fmt: skip
        return make_plan(resolve(given | flags), SilentReporter(), base=tiny_models)

    return plan


@pytest.fixture
def run(plan: Callable[..., RunPlan]) -> Callable[..., Path]:
    """Train in a folder of this name, and return the folder."""
    return lambda folder, **flags: train(plan(folder, **flags), SilentReporter(), StopRequest()).folder


def figures(folder: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines]


def files(folder: Path) -> list[bytes]:
    """The checkpoint, weights and optimizer of the last step."""
    state = folder / f"state/step-{LAST}"
    names = (folder / f"step-{LAST}.safetensors", state / "trained.safetensors", state / "optimizer.safetensors")
    return [path.read_bytes() for path in names]


def check_equal(one: Path, other: Path) -> None:
    assert figures(one) == figures(other) and len(figures(one)) == LAST
    assert files(one) == files(other)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_update_computes_the_same_to_the_bit(run, kind, checkpointing):
    given = {**KINDS[kind], "use_gradient_checkpointing": checkpointing}
    plain = run("plain", **given)
    for name, way in WAYS.items():
        check_equal(plain, run(name, **given, **way))


def test_weights_of_parts_that_are_recomputed_once_more_are_updated_the_same(run):
    """In memory, and while their blocks wait in host memory."""
    given = {**KINDS["full"], "use_gradient_checkpointing": True}
    plain, nested = run("plain", **given), {"checkpointing": "nested", **FUSED}
    check_equal(plain, run("fused", **given, **nested))
    check_equal(plain, run("swapped", **given, **nested, blocks_to_swap=2))


@pytest.mark.parametrize("checkpointing", ["keep_attention", "keep_every_2"])
def test_weights_of_blocks_of_which_more_is_kept_are_updated_the_same(run, checkpointing):
    given = {**KINDS["full"], "use_gradient_checkpointing": True}
    check_equal(run("plain", **given), run("fused", **given, **FUSED, checkpointing=checkpointing))


BF16 = {"recipe": "qwen-image-full", "learning_rate": 1e-3, "mixed_precision": "bf16", "trained_dtype": "bf16"}


def test_weights_in_bf16_are_updated_the_same(run):
    given = {**BF16, "optimizer": "adafactor"}
    check_equal(run("plain", **given), run("fused", **given, **FUSED, **ON_HOST))


def test_a_run_may_resume_in_another_way(run):
    """As both change speed and memory alone."""
    given = {**KINDS["full"], "save_state_steps": 2}
    through = run("through", **given)
    for step, way in enumerate(({}, FUSED, FUSED | ON_HOST, ON_HOST)):
        pieces = run("pieces", **given, **way, max_steps=2 * step + 2, resume="auto")
    check_equal(through, pieces)


def test_no_more_gradients_are_kept_than_are_planned(plan, monkeypatch):
    kept, update = [], FusedEngine._update

    def counting(self: FusedEngine, parameter: Tensor) -> None:
        kept.append(sum(weight.grad.nbytes for weight in self._trained.values() if weight.grad is not None))
        update(self, parameter)

    monkeypatch.setattr(FusedEngine, "_update", counting)
    plain, fused = (plan(name, **KINDS["full"], max_steps=1, **way) for name, way in (("plain", {}), ("fused", FUSED)))
    train(fused, SilentReporter(), StopRequest())
    before, after = (
        device_memory(each, memory_config(each, find_workload(each).largest)).training for each in (plain, fused)
    )
    assert max(kept) == after.gradients < before.gradients / 10
    assert before.total - after.total == before.gradients - after.gradients - after.update


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make the loss, or the gradients of a finite loss, NaN in step 4."""

    def spoil(what: str) -> None:
        forward, calls = TrainingModule.forward, itertools.count(1)

        def spoiled(self: TrainingModule, micro_batch: object) -> Tensor:
            losses = forward(self, micro_batch)
            if next(calls) == 5:  # the first is that of the trial
                losses.register_hook(lambda gradient: gradient * torch.nan)
                return losses * torch.nan if what == "loss" else losses
            return losses

        monkeypatch.setattr(TrainingModule, "forward", spoiled)

    return spoil


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_after_a_value_that_is_not_finite_the_last_state_stands(run, spoil, tmp_path, monkeypatch, what):
    with monkeypatch.context() as patch, pytest.raises(DiffSynthError) as caught:
        updated = []
        update = FusedEngine._update
        patch.setattr(FusedEngine, "_update", lambda self, weight: updated.append(weight) or update(self, weight))
        spoil(what)
        run("out", **KINDS["lora"], **FUSED, save_state_steps=2, save_steps=1)
    [problem] = caught.value.problems
    assert problem.message.startswith(f"the {what} is not finite in step 4; the state after step 2 is saved in ")
    assert "max_grad_norm" not in problem.hint  # which is rejected with it
    assert len(updated) == 4 * len(set(updated))  # the loss is read after its backward pass, with the norm
    out = tmp_path / "out"
    assert [path.name for path in (out / "state").iterdir()] == ["step-2"]
    assert sorted(path.stem for path in out.glob("*.safetensors")) == ["step-1", "step-2", "step-3"]
    written = [tensor for path in out.rglob("*.safetensors") for tensor in load_file(path).values()]
    assert all(tensor.isfinite().all() for tensor in written), "no update by NaN reaches the disk"
    monkeypatch.undo()
    check_equal(run("through", **KINDS["lora"]), run("out", **KINDS["lora"], **FUSED, resume="auto"))


def test_weights_are_not_saved_after_a_fault_in_the_backward_pass(run, tmp_path, monkeypatch):
    """Some are updated, others not."""
    update, calls = FusedEngine._update, itertools.count(1)

    def failing(self: FusedEngine, parameter: Tensor) -> None:
        if next(calls) == 3 * len(self._trained) + 5:
            raise RuntimeError("out of memory")
        update(self, parameter)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(FusedEngine, "_update", failing)
        run("out", **KINDS["lora"], **FUSED, save_state_steps=2)
    assert [path.name for path in (tmp_path / "out/state").iterdir()] == ["step-2"]
    check_equal(run("through", **KINDS["lora"]), run("out", **KINDS["lora"], **FUSED, resume="auto"))


@pytest.mark.parametrize("offload", [False, True], ids=["inputs kept", "inputs offloaded"])
def test_blocks_that_train_from_host_memory_compute_the_same_to_the_bit(run, offload):
    given = {**KINDS["full"], "use_gradient_checkpointing": True, "use_gradient_checkpointing_offload": offload}
    plain = run("plain", **given)
    for number in (1, 2):
        check_equal(plain, run(f"swapped-{number}", **given, **FUSED, blocks_to_swap=number))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize(
    "recipe",
    long_ones(
        ("wan2.1-t2v-1.3b-full", "flux.1-dev-full", "flux.2-klein-4b-full"),
        long=("flux.1-dev-full", "flux.2-klein-4b-full"),
    ),
)
def test_blocks_of_every_family_train_from_host_memory(recipe, tmp_path):
    """In bf16, where autocast and weights that stay float32 meet."""
    given = {"mixed_precision": "bf16", "max_steps": 2, "use_gradient_checkpointing": True, "learning_rate": 1e-3}
    folders = [
        train(
            plan_step(recipe, tmp_path, **given, **way, output_path=tmp_path / name), SilentReporter(), StopRequest()
        ).folder
        for name, way in (("plain", {}), ("swapped", FUSED | {"blocks_to_swap": 2}))
    ]
    assert figures(folders[0]) == figures(folders[1])
    names = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*.safetensors"))
    assert len(names) == 3 and all(
        (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names
    )


def test_blocks_that_wait_are_counted_on_the_host(plan, monkeypatch):
    """With the state of their optimizer; and no more is on the device than the estimate says."""
    swapped = plan("swapped", **KINDS["full"], **FUSED, use_gradient_checkpointing=True, blocks_to_swap=2, max_steps=1)
    usual = plan("usual", **KINDS["full"], **FUSED, use_gradient_checkpointing=True, max_steps=1)
    run, config = find_workload(swapped), memory_config(swapped, find_workload(swapped).largest)
    memory, before = device_memory(swapped, config), device_memory(usual, replace(config, blocks_to_swap=0)).training
    after = memory.training
    assert before.optimizer - after.optimizer == 2 * after.swapped  # two moments in float32
    assert host_memory(swapped, config, memory, run.encoded)["optimizer state"] == 2 * after.swapped
    assert before.weights["dit"] - after.weights["dit"] == after.swapped
    assert 1 < after.swap_buffers / after.swapped < 1.2  # the last block has fewer weights that take gradients

    resident, states = [], []
    begin = FusedEngine.begin

    def counting(self: FusedEngine, rate: float, number: int) -> None:
        begin(self, rate, number)
        weights = self._module.components["dit"].parameters()
        resident.append(sum(weight.nbytes for weight in weights if weight not in self._swap))
        states.append(self._one_by_one)

    monkeypatch.setattr(FusedEngine, "begin", counting)
    train(swapped, SilentReporter(), StopRequest())
    assert resident == [after.weights["dit"]]
    waiting = [weight for weight in states[0]._parts if states[0].state_waits(weight)]
    assert sum(weight.nbytes for weight in waiting) == after.swapped

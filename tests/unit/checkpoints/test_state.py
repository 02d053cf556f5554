"""The state of a run: AdamW's state is restored bit for bit, and an incomplete state is never used."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffsynth_core.checkpoints.saved_states import LoopState, SavedState, find_states
from diffsynth_core.checkpoints.state import restore_state, save_state, state_of
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.optimizers.per_parameter import PerParameterOptimizer


def training(seed: int = 0, width: int = 3) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """A model of two trained tensors of different dtypes and its optimizer."""
    generator = torch.Generator().manual_seed(seed)
    trained = {
        "dit.a.lora_A.default.weight": nn.Parameter(torch.randn(4, width, generator=generator)),
        "dit.norm/odd name": nn.Parameter(torch.randn(5, generator=generator).double()),
    }
    return trained, torch.optim.AdamW(trained.values(), lr=0.1, weight_decay=0.05)


def take_steps(trained, optimizer, first: int, count: int) -> None:
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for parameter in trained.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()


def everything(trained, optimizer) -> dict[str, torch.Tensor]:
    found = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for name, parameter in trained.items():
        found |= {f"{name}/{kind}": value.clone() for kind, value in optimizer.state[parameter].items()}
    return found


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def saved(folder, steps: int = 3, keep: int = 1, **changes):
    trained, optimizer = training(**changes)
    take_steps(trained, optimizer, 0, steps)
    save_state(folder, LoopState(steps, 4 * steps, {}), state_of(trained, optimizer), keep)
    return trained, optimizer


def hashes(paths) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def newest(folder) -> SavedState:
    found = find_states(folder, "", hashes).newest
    assert found
    return found


def restore(folder, trained, optimizer) -> LoopState:
    state = newest(folder)
    restore_state(state.path, state.loop_state, trained, optimizer)
    return state.loop_state


def states_in(folder) -> list[str]:
    return sorted(path.name for path in (folder / "state").iterdir())


def test_weights_and_moments_come_back_bit_by_bit(tmp_path):
    trained, optimizer = saved(tmp_path)
    other, other_optimizer = training(seed=9)
    restore(tmp_path, other, other_optimizer)
    assert len(everything(other, other_optimizer)) == 2 + 2 * 3
    assert_same_bits(everything(trained, optimizer), everything(other, other_optimizer))


def test_a_run_that_went_on_equals_one_that_never_stopped(tmp_path):
    trained, optimizer = saved(tmp_path)
    other, other_optimizer = training(seed=9)
    restore(tmp_path, other, other_optimizer)
    for each in ((trained, optimizer), (other, other_optimizer)):
        take_steps(*each, first=3, count=4)
    assert_same_bits(everything(trained, optimizer), everything(other, other_optimizer))


def test_the_optimizer_goes_on_with_the_very_parameters_of_the_model(tmp_path):
    saved(tmp_path)
    other, optimizer = training(seed=9)
    before = list(other.values())
    restore(tmp_path, other, optimizer)
    assert all(one is two for one, two in zip(before, other.values(), strict=True))
    assert all(parameter.requires_grad for parameter in other.values())


def test_a_parameter_without_a_gradient_so_far_has_no_moments(tmp_path):
    trained, optimizer = training()
    first, second = trained.values()
    first.grad = torch.ones_like(first)
    optimizer.step()
    save_state(tmp_path, LoopState(1, 1, {}), state_of(trained, optimizer), keep=1)
    other, other_optimizer = training(seed=9)
    restore(tmp_path, other, other_optimizer)
    assert len(everything(other, other_optimizer)) == 2 + 3
    assert torch.equal(other["dit.norm/odd name"], second)


@pytest.mark.parametrize("scaler", [{}, {"scale": 65536.0, "growth_tracker": 3}])
def test_the_position_comes_back(tmp_path, scaler):
    position = LoopState(12, 48, scaler)
    save_state(tmp_path, position, state_of(*training()), keep=1)
    found = newest(tmp_path)
    assert found.path == tmp_path / "state" / "step-12"
    assert replace(found.loop_state, files=None, sha256=None, optimizer=position.optimizer) == position


@pytest.mark.parametrize(("keep", "kept"), [(1, [9]), (2, [4, 9]), (3, [3, 4, 9]), (9, [2, 3, 4, 9])])
def test_so_many_states_are_kept(tmp_path, keep, kept):
    """Later states belong to a run that was resumed from an older state because they were damaged."""
    for steps in (2, 3, 4, 10, 12):
        saved(tmp_path, steps, keep=9)
    saved(tmp_path, 9, keep)
    assert states_in(tmp_path) == sorted(f"step-{step}" for step in kept)
    assert sorted(path.name for path in (tmp_path / "state" / "step-9").iterdir()) == [
        "optimizer.safetensors", "state.json", "trained.safetensors",
    ]  # fmt: skip


def test_a_state_is_written_in_place_of_a_damaged_one_of_its_step(tmp_path):
    saved(tmp_path, 3)
    (tmp_path / "state/step-3/trained.safetensors").write_bytes(b"")
    assert find_states(tmp_path, "", hashes).newest is None
    saved(tmp_path, 3)
    assert newest(tmp_path).loop_state.step == 3


def test_there_is_no_state_in_a_new_folder(tmp_path):
    assert find_states(tmp_path, "", hashes).newest is None
    assert find_states(tmp_path / "gone", "", hashes).newest is None


def test_a_folder_without_its_last_file_is_no_whole_state(tmp_path):
    saved(tmp_path, 3)
    half = tmp_path / "state" / "step-7"
    half.mkdir()
    for name in ("trained.safetensors", "optimizer.safetensors"):
        (half / name).write_bytes((tmp_path / "state" / "step-3" / name).read_bytes())
    found = find_states(tmp_path, "", hashes)
    assert found.newest and found.newest.path.name == "step-3"
    assert [(state.step, state.reason) for state in found.damaged] == [(7, "`state.json` is missing")]
    saved(tmp_path, 8)
    assert states_in(tmp_path) == ["step-8"]


def test_the_newest_state_is_the_one_of_the_highest_number(tmp_path):
    saved(tmp_path, 9)
    saved(tmp_path, 10, keep=2)
    assert newest(tmp_path).path.name == "step-10"


def test_a_folder_that_somebody_else_put_there_is_passed_over(tmp_path):
    saved(tmp_path, 3)
    for name in ("step-3.bak", "step-²"):
        (tmp_path / "state" / name).mkdir()
        (tmp_path / "state" / name / "state.json").write_text("{}")
    found = find_states(tmp_path, "", hashes)
    assert found.newest and found.newest.path.name == "step-3" and not found.damaged


def test_a_state_that_cannot_be_written_leaves_the_one_before_it(tmp_path):
    trained, optimizer = saved(tmp_path, 3)
    expected = everything(trained, optimizer)
    tensors, sparse = state_of(trained, optimizer), torch.eye(3).to_sparse()
    with pytest.raises(RuntimeError):
        save_state(tmp_path, LoopState(4, 16, {}), replace(tensors, weights={**trained, "sparse": sparse}), keep=1)
    assert states_in(tmp_path) == ["step-3"]
    other, other_optimizer = training(seed=9)
    restore(tmp_path, other, other_optimizer)
    assert_same_bits(expected, everything(other, other_optimizer))
    assert newest(tmp_path).loop_state.samples_seen == 12


def test_what_an_optimizer_keeps_beside_tensors_comes_back(tmp_path):
    """Schedule-free optimizers keep counts and sums in their groups, and some a number for each parameter."""
    trained, optimizer = saved(tmp_path)
    first = next(iter(trained.values()))
    optimizer.state[first]["restarts"] = 3
    optimizer.param_groups[0].update({"k": 7, "weight_sum": 0.1, "betas": (0.8, 0.9), "train_mode": True})
    save_state(tmp_path, LoopState(5, 20, {}), state_of(trained, optimizer), keep=1)
    other, other_optimizer = training(seed=9)
    restore(tmp_path, other, other_optimizer)
    assert other_optimizer.state[next(iter(other.values()))]["restarts"] == 3
    group = other_optimizer.param_groups[0]
    assert (group["k"], group["weight_sum"], group["betas"], group["train_mode"]) == (7, 0.1, (0.8, 0.9), True)
    assert group["lr"] == 0.1 and len(group["params"]) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda trained: trained.pop("dit.norm/odd name"),
        lambda trained: trained.update({"dit.more": nn.Parameter(torch.ones(1))}),
        lambda trained: trained.update({"dit.a.lora_A.default.weight": nn.Parameter(torch.ones(4, 5))}),
        lambda trained: trained.update({"dit.a.lora_A.default.weight": nn.Parameter(torch.ones(2, 4, 3))}),
    ],
    ids=["fewer", "more", "another rank", "a shape it would spread over"],
)
def test_the_state_of_other_parameters_is_refused_before_a_weight_changes(tmp_path, change):
    saved(tmp_path)
    trained, _ = training(seed=9)
    change(trained)
    optimizer = torch.optim.AdamW(trained.values())
    before = everything(trained, optimizer)
    with pytest.raises(DiffSynthError, match="step-3"):
        restore(tmp_path, trained, optimizer)
    assert_same_bits(before, everything(trained, optimizer))


def test_the_position_file_says_what_it_holds(tmp_path):
    saved(tmp_path)
    content = json.loads((tmp_path / "state/step-3/state.json").read_text())
    assert {name: content[name] for name in ("step", "samples_seen", "scaler")} == {
        "step": 3,
        "samples_seen": 12,
        "scaler": {},
    }
    state = tmp_path / "state/step-3"
    for name, digest in content["files"].items():
        assert [digest] == hashes([state / name])


def test_a_state_from_before_states_had_hashes_is_whole(tmp_path):
    saved(tmp_path)
    path = tmp_path / "state/step-3/state.json"
    path.write_text('{"step": 3, "samples_seen": 12, "scaler": {"scale": 2.0, "_growth_tracker": 1}}')
    assert newest(tmp_path).loop_state == LoopState(3, 12, {"scale": 2.0, "_growth_tracker": 1})
    (tmp_path / "state/step-3/optimizer.safetensors").write_bytes(b"cut")
    [damaged] = find_states(tmp_path, "", hashes).damaged
    assert damaged.reason.startswith("`optimizer.safetensors` (3 bytes) is not a valid safetensors file")


@pytest.mark.parametrize(("fused", "place"), [(True, "meta"), (False, "cpu")])
def test_counters_of_weights_that_wait_are_where_the_optimizer_needs_them(tmp_path, fused, place):
    """A fused AdamW counts on the device of the update, which stands here for an accelerator."""
    saved(tmp_path)
    trained, _ = training()

    def make(some):
        optimizer = torch.optim.AdamW(some.values(), lr=0.1, weight_decay=0.05)
        for group in optimizer.param_groups:
            group["fused"] = fused
        return optimizer

    optimizer = PerParameterOptimizer(make, trained, torch.device("meta"), on_host=trained)
    state = newest(tmp_path)
    restore_state(state.path, state.loop_state, trained, optimizer)
    kinds = {kind: value.device.type for kind, value in optimizer.state[next(iter(trained.values()))].items()}
    assert kinds == {"step": place, "exp_avg": "cpu", "exp_avg_sq": "cpu"}

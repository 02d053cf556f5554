"""The state of a run: everything AdamW needs comes back bit by bit, and a half state is never taken for a whole one."""

import json

import pytest
import torch
from torch import nn

from diffsynth_core.checkpoints.state import Position, last_state, read_position, restore_state, save_state
from diffsynth_core.errors import DiffSynthError


def training(seed: int = 0, width: int = 3) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """A model of two trained tensors of different number formats and its optimizer."""
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


def saved(folder, steps: int = 3, **changes):
    trained, optimizer = training(**changes)
    take_steps(trained, optimizer, 0, steps)
    save_state(folder, Position(steps, 4 * steps), trained, optimizer)
    return trained, optimizer


def test_weights_and_moments_come_back_bit_by_bit(tmp_path):
    trained, optimizer = saved(tmp_path)
    other, other_optimizer = training(seed=9)
    restore_state(last_state(tmp_path), other, other_optimizer)
    assert len(everything(other, other_optimizer)) == 2 + 2 * 3
    assert_same_bits(everything(trained, optimizer), everything(other, other_optimizer))


def test_a_run_that_went_on_equals_one_that_never_stopped(tmp_path):
    trained, optimizer = saved(tmp_path)
    other, other_optimizer = training(seed=9)
    restore_state(last_state(tmp_path), other, other_optimizer)
    for each in ((trained, optimizer), (other, other_optimizer)):
        take_steps(*each, first=3, count=4)
    assert_same_bits(everything(trained, optimizer), everything(other, other_optimizer))


def test_the_optimizer_goes_on_with_the_very_parameters_of_the_model(tmp_path):
    saved(tmp_path)
    other, optimizer = training(seed=9)
    before = list(other.values())
    restore_state(last_state(tmp_path), other, optimizer)
    assert all(one is two for one, two in zip(before, other.values(), strict=True))
    assert all(parameter.requires_grad for parameter in other.values())


def test_a_parameter_without_a_gradient_so_far_has_no_moments(tmp_path):
    trained, optimizer = training()
    first, second = trained.values()
    first.grad = torch.ones_like(first)
    optimizer.step()
    save_state(tmp_path, Position(1, 1), trained, optimizer)
    other, other_optimizer = training(seed=9)
    restore_state(last_state(tmp_path), other, other_optimizer)
    assert len(everything(other, other_optimizer)) == 2 + 3
    assert torch.equal(other["dit.norm/odd name"], second)


@pytest.mark.parametrize("scaler", [{}, {"scale": 65536.0, "growth_tracker": 3}])
def test_the_position_comes_back(tmp_path, scaler):
    position = Position(12, 48, scaler)
    save_state(tmp_path, position, *training())
    assert last_state(tmp_path) == tmp_path / "state" / "step-12"
    assert read_position(last_state(tmp_path)) == position


def test_the_states_before_it_are_removed(tmp_path):
    for steps in (2, 10, 9):
        saved(tmp_path, steps)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-9"]
    assert sorted(path.name for path in (tmp_path / "state" / "step-9").iterdir()) == [
        "optimizer.safetensors", "state.json", "trained.safetensors",
    ]  # fmt: skip


def test_there_is_no_state_in_a_new_folder(tmp_path):
    assert last_state(tmp_path) is None
    assert last_state(tmp_path / "gone") is None


def test_a_folder_without_its_last_file_is_no_state(tmp_path):
    saved(tmp_path, 3)
    half = tmp_path / "state" / "step-7"
    half.mkdir()
    for name in ("trained.safetensors", "optimizer.safetensors"):
        (half / name).write_bytes((tmp_path / "state" / "step-3" / name).read_bytes())
    assert last_state(tmp_path).name == "step-3"
    saved(tmp_path, 8)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-8"]


def test_the_last_state_is_the_one_of_the_highest_number(tmp_path):
    saved(tmp_path, 9)
    (tmp_path / "state" / "step-9").rename(tmp_path / "elsewhere")
    saved(tmp_path, 10)
    (tmp_path / "elsewhere").rename(tmp_path / "state" / "step-9")
    assert last_state(tmp_path).name == "step-10"


def test_a_folder_that_somebody_else_put_there_is_passed_over(tmp_path):
    saved(tmp_path, 3)
    (tmp_path / "state" / "step-3.bak").mkdir()
    (tmp_path / "state" / "step-3.bak" / "state.json").write_text("{}")
    assert last_state(tmp_path).name == "step-3"


def test_a_state_that_cannot_be_written_leaves_the_one_before_it(tmp_path):
    trained, optimizer = saved(tmp_path, 3)
    expected = everything(trained, optimizer)
    with pytest.raises(RuntimeError):
        save_state(tmp_path, Position(4, 16), {**trained, "sparse": torch.eye(3).to_sparse()}, optimizer)
    assert last_state(tmp_path) is not None
    other, other_optimizer = training(seed=9)
    restore_state(last_state(tmp_path), other, other_optimizer)
    assert_same_bits(expected, everything(other, other_optimizer))
    assert read_position(last_state(tmp_path)) == Position(3, 12)


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: b"", None])
def test_damaged_tensors_are_told(tmp_path, name, damage):
    saved(tmp_path)
    path = last_state(tmp_path) / name
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    trained, optimizer = training(seed=9)
    before = everything(trained, optimizer)
    with pytest.raises(DiffSynthError, match=r"the state `.*step-3` cannot be read") as caught:
        restore_state(last_state(tmp_path), trained, optimizer)
    assert caught.value.problems[0].hint
    assert_same_bits(before, everything(trained, optimizer))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"step": 3}', '{"step": 3, "samples_seen": 1, "more": 2}'])
def test_a_damaged_position_is_told(tmp_path, content):
    saved(tmp_path)
    (last_state(tmp_path) / "state.json").write_text(content)
    with pytest.raises(DiffSynthError, match=r"state\.json` cannot be read"):
        read_position(last_state(tmp_path))


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
        restore_state(last_state(tmp_path), trained, optimizer)
    assert_same_bits(before, everything(trained, optimizer))


def test_the_position_file_says_what_it_holds(tmp_path):
    saved(tmp_path)
    assert json.loads((tmp_path / "state/step-3/state.json").read_text()) == {
        "step": 3,
        "samples_seen": 12,
        "scaler": {},
    }

"""Faults in the middle of a run: completed steps are saved, the fault is reported, and the run can be resumed."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffsynth_core.config.resolve import resolve
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.planning.data.encodings import plan_encodings
from diffsynth_core.planning.plan import make_plan
from diffsynth_core.progress import SilentReporter, Task
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.loop import train

FLAGS = {
    "recipe": "qwen-image-lora", "dataset_num_workers": "0", "dataset_repeat": "2", "num_epochs": "1", "lora_rank": "2",
    "lora_target_modules": "to_q", "learning_rate": "0.01", "save_steps": "100", "device": "cpu",
}  # fmt: skip
LAST_STEP = 8


class Meddler(SilentReporter):
    """Acts on the run after a step, as a user or the machine might; collects messages."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step, self.action = step, action
        self.messages: list[str] = []

    def info(self, message: str) -> None:
        self.messages.append(message)

    warn = info

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        step = done

        class Counting:
            def advance(_, count: int = 1, **_figures: str) -> None:  # noqa: N805
                nonlocal step
                step += count
                if label == "Training" and step == self.step:
                    self.action()

        yield Counting()


@pytest.fixture
def run(tiny_models: Path, photographs: Path, tmp_path: Path) -> Callable[..., Meddler]:
    """Train in `tmp_path/out`; `action` is called after `step`."""

    def train_once(step: int = 0, action: Callable[[], object] = lambda: None, **more: str) -> Meddler:
        flags = FLAGS | {"dataset_base_path": str(photographs), "output_path": str(tmp_path / "out")}
        meddler = Meddler(step, action)
        run.reporter = meddler  # type: ignore[attr-defined]
        plan = make_plan(resolve(flags | more), SilentReporter(), base=tiny_models)
        run.plan = plan  # type: ignore[attr-defined]
        train(plan, meddler, StopRequest())
        return meddler

    run = train_once
    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def states_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "state").iterdir())


def check_goes_on(run: Callable[..., Meddler], out: Path, tmp_path: Path) -> None:
    """Check that the resumed run ends with the weights of a run without a fault."""
    run(resume="auto")
    run(output_path=str(tmp_path / "through"))
    last = f"step-{LAST_STEP}.safetensors"
    one, other = load_file(out / last), load_file(tmp_path / "through" / last)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert record_of(out)["status"] == "completed"


def fail() -> None:
    raise RuntimeError("the terminal is gone")


def test_any_fault_in_a_step_saves_the_steps_before_it(run, out, tmp_path, says):
    with pytest.raises(RuntimeError, match="the terminal is gone"):
        run(3, fail)
    assert states_in(out) == ["step-3"]
    record = record_of(out)
    assert (record["status"], record["step"], record["failure"]) == ("failed", 3, "RuntimeError: the terminal is gone")
    assert run.reporter.messages[-1] == "Saved the state after step 3; continue with `--resume auto`"
    check_goes_on(run, out, tmp_path)


def test_a_cached_encoding_that_is_lost_while_training(run, out, tmp_path, monkeypatch):
    """One that does not fit in the memory in which encodings stay."""
    monkeypatch.setattr("diffsynth_core.training.loader.KEPT_ENCODINGS", 0)

    def lose() -> None:
        for part in plan_encodings(run.plan, SilentReporter()).encoders:
            for key in part.keys.values():
                part.cache.path(key).unlink()

    with pytest.raises(DiffSynthError, match="cannot read the cached encoding"):
        run(5, lose, cache_path=str(tmp_path / "cache"))
    assert states_in(out) == ["step-5"]
    check_goes_on(run, out, tmp_path)


def test_the_last_checkpoint_is_written_after_a_fault_behind_the_last_step(run, out, tmp_path):
    with pytest.raises(RuntimeError):
        run(LAST_STEP, fail)
    assert states_in(out) == [f"step-{LAST_STEP}"] and not list(out.glob("step-*.safetensors"))
    check_goes_on(run, out, tmp_path)


def test_a_state_that_cannot_be_saved_does_not_hide_the_fault(run, out):
    def fill_and_fail() -> None:
        (out / "state").write_text("in the way")
        fail()

    with pytest.raises(RuntimeError, match="the terminal is gone"):
        run(3, fill_and_fail)
    assert run.reporter.messages[-1].startswith("cannot save the state after step 3: cannot write `")
    assert record_of(out)["step"] == 0


@pytest.mark.parametrize("step", [3, LAST_STEP])
@pytest.mark.parametrize("renamed", [False, True], ids=["removed", "renamed"])
def test_an_output_folder_that_goes_away_is_noticed(run, out, tmp_path, renamed, step):
    def take_away() -> None:
        out.rename(tmp_path / "moved") if renamed else shutil.rmtree(out)

    noticed = min(step + 1, LAST_STEP)
    with pytest.raises(DiffSynthError) as caught:
        run(step, take_away)
    [problem] = caught.value.problems
    assert problem.message == f"`{out}` was removed or renamed during the run, which stopped after step {noticed}"
    assert problem.hint and "--resume auto" in problem.hint
    assert states_in(out) == [f"step-{noticed}"]
    assert (record_of(out)["status"], record_of(out)["step"]) == ("failed", noticed)
    check_goes_on(run, out, tmp_path)


def diverge(run: Callable[..., Meddler], monkeypatch: pytest.MonkeyPatch, **more: str) -> str:
    """A run with a non-finite gradient in its fourth step."""
    from diffsynth_core.training.engines.replicated import ReplicatedEngine

    measure, calls = ReplicatedEngine.gradient_norm, itertools.count(1)
    with monkeypatch.context() as patch, pytest.raises(DiffSynthError) as caught:
        patch.setattr(
            ReplicatedEngine, "gradient_norm", lambda self: measure(self) * (torch.nan if next(calls) == 4 else 1)
        )
        run(**more)
    [problem] = caught.value.problems
    return problem.message


def test_after_a_loss_that_is_not_finite_the_state_before_stays(run, out, monkeypatch):
    message = diverge(run, monkeypatch, save_state_steps="2")
    assert message.startswith(
        f"the gradient is not finite in step 4; the state after step 2 is saved in `{out / 'state'}`"
    )
    assert states_in(out) == ["step-2"]
    assert (record_of(out)["status"], record_of(out)["step"], record_of(out)["diverged_step"]) == ("failed", 2, 4)
    run(resume="auto", learning_rate="0.001")
    record = record_of(out)
    assert (record["status"], record["parameters"]["learning_rate"]) == ("completed", 0.001)
    assert record["diverged_step"] is None
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in steps] == [0.01] * 2 + [0.001] * 6


def test_the_weights_with_which_the_loss_was_not_finite_are_not_gone_on_with(run, out, monkeypatch):
    """The state with these weights was saved, because every step is here: the run resumes from the one before."""
    diverge(run, monkeypatch, save_state_steps="1", keep_states="2")
    shutil.copytree(out, out.with_name("copy"))
    assert states_in(out) == ["step-2", "step-3"]
    run(resume="auto", learning_rate="0.001")
    assert record_of(out)["status"] == "completed"
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in steps] == [0.01] * 2 + [0.001] * 6
    shutil.rmtree(out.with_name("copy") / "state/step-2")
    with pytest.raises(DiffSynthError) as caught:
        run(output_path=str(out.with_name("copy")), resume="auto", learning_rate="0.001")
    [problem] = caught.value.problems
    assert "its only state is that after step 3, from which the loss of step 4 was not finite" in problem.message

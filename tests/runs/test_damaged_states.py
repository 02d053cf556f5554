"""Damage to every file and field of a run's state: a run is never resumed from it, and never silently starts at step
0.

One run is trained, stopped after step 5 with the states of steps 4 and 5, and copied for each case.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffsynth_core.config.resolve import resolve
from diffsynth_core.errors import Problem, collect_problems
from diffsynth_core.planning.output.folder import ResumePoint, check_output
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.loop import train

FLAGS = {
    "recipe": "qwen-image-lora", "dataset_num_workers": "0", "dataset_repeat": "2", "num_epochs": "1", "lora_rank": "2",
    "lora_target_modules": "to_q", "learning_rate": "0.01", "save_steps": "4", "save_state_steps": "2", "device": "cpu",
}  # fmt: skip
FILES = ("trained.safetensors", "optimizer.safetensors", "state.json")
Damage = Callable[[Path, Path], None]
"""Damages a file, given the file of another run."""


@dataclass(frozen=True)
class Stopped:
    """A run stopped after step 5 of 8, the state of another run at that step, and an uninterrupted run."""

    plan: RunPlan
    folder: Path
    other: Path
    through: Path

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns(".lock")))

    def resume(self, folder: Path) -> tuple[ResumePoint, list[Problem]]:
        """Return where a copy of the run would resume."""
        parameters = self.plan.parameters.model_copy(update={"output_path": folder, "resume": "auto"})
        fingerprint, steps = self.plan.data.fingerprint, self.plan.data.steps
        with collect_problems() as problems:
            start = check_output(parameters, fingerprint, steps, "no", (), SilentReporter())
        return start, problems


@pytest.fixture(scope="module")
def stopped(tiny_models: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    base = tmp_path_factory.mktemp("stopped")

    def run(name: str, stop_after: int | None, **more: str) -> RunPlan:
        flags = FLAGS | {"dataset_base_path": str(photographs), "output_path": str(base / name)} | more
        plan = make_plan(resolve(flags), SilentReporter(), base=tiny_models)
        train(plan, SilentReporter(), StopRequest(), stop_after=stop_after)
        return plan

    plan = run("run", 5)
    run("other", 5, seed="1")
    run("through", None)
    assert sorted(path.name for path in (base / "run/state").iterdir()) == ["step-4", "step-5"]
    return Stopped(plan, base / "run", base / "other", base / "through")


def flip(place: float) -> Damage:
    """Flip one bit of the byte at a fraction of the file."""

    def damage(path: Path, other: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(place * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return damage


def put_folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def put_dead_link(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def remove_one_tensor(path: Path, other: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)


DAMAGES: dict[str, Damage] = {
    **{f"bit flip at {place}": flip(place) for place in (0, 0.01, 0.3, 0.6, 0.9, 1)},
    "cut to half": lambda path, other: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "cut by a byte": lambda path, other: path.write_bytes(path.read_bytes()[:-2]),
    "empty": lambda path, other: path.write_bytes(b""),
    "a byte more": lambda path, other: path.write_bytes(path.read_bytes() + b"}"),
    "zeros": lambda path, other: path.write_bytes(bytes(path.stat().st_size)),
    "zeros in the middle": lambda path, other: path.write_bytes(
        (whole := path.read_bytes())[: len(whole) // 2] + bytes(len(whole) // 4) + whole[len(whole) * 3 // 4 :]
    ),
    "missing": lambda path, other: path.unlink(),
    "of another run": lambda path, other: path.write_bytes(other.read_bytes()),
    "a folder": put_folder,
    "a dead link": put_dead_link,
}  # fmt: skip
FIELDS = (
    ("step",), ("samples_seen",), ("scaler",), ("optimizer",), ("optimizer", "parameters"), ("optimizer", "groups"),
    ("files",), ("run",), ("files", "trained.safetensors"), ("files", "optimizer.safetensors"), ("sha256",),
)  # fmt: skip
WRONG_VALUES: tuple[Any, ...] = (None, True, -1, 7, 2.5, "x", [], [[]], {"x": 1}, "missing")


def set_field(place: tuple[str, ...], value: Any) -> Damage:
    def damage(path: Path, other: Path) -> None:
        content = json.loads(path.read_text())
        *above, last = place
        inner = content
        for name in above:
            inner = inner[name]
        if value == "missing":
            del inner[last]
        else:
            inner[last] = value
        path.write_text(json.dumps(content))

    return damage


def cases() -> Iterator[Any]:
    for file in FILES:
        for name, damage in DAMAGES.items():
            yield pytest.param(file, damage, id=f"{file}: {name}")
    for file in FILES[:2]:
        yield pytest.param(file, remove_one_tensor, id=f"{file}: a tensor less")
    for place in FIELDS:
        for value in WRONG_VALUES:
            yield pytest.param("state.json", set_field(place, value), id=f"state.json: {'.'.join(place)} = {value}")


CASES = list(cases())


def test_there_are_cases_enough():
    assert len(CASES) >= 100


@pytest.mark.parametrize(("file", "damage"), CASES)
def test_a_damaged_state_is_never_gone_on_from(stopped, tmp_path, file, damage):
    """The previous one is used, with a warning; if that is damaged too, none is, and the report states what to do."""
    run = stopped.copy(tmp_path / "run")
    damage(run / "state/step-5" / file, stopped.other / "state/step-5" / file)
    start, problems = stopped.resume(run)
    assert not problems
    assert (start.first_step, start.state.path.name if start.state else None) == (4, "step-4")
    [warning] = start.warnings
    assert warning.startswith("the state after step 5 is damaged (`") and warning.endswith("): 1 step is lost")
    assert any(f"`{name}`" in warning for name in FILES)

    damage(run / "state/step-4" / file, stopped.other / "state/step-4" / file)
    start, [problem] = stopped.resume(run)
    assert start == ResumePoint()
    assert problem.message.startswith(f"the run in `{run}` cannot be resumed: it has no intact state: step 5 (`")
    assert ", step 4 (`" in problem.message
    assert problem.hint == (
        "start a new run in another `--output_path`, from its weights with "
        f"`--lora_checkpoint {run}/step-5.safetensors`, or delete `{run}`"
    )


def test_a_whole_state_of_another_run_is_not_taken_for_one_of_this(stopped, tmp_path):
    run = stopped.copy(tmp_path / "run")
    shutil.rmtree(run / "state/step-5")
    shutil.copytree(stopped.other / "state/step-5", run / "state/step-5")
    start, problems = stopped.resume(run)
    assert (start.first_step, problems) == (4, [])
    assert start.warnings == (
        "the state after step 5 is damaged (`state.json`: it belongs to another run): 1 step is lost",
    )


def test_whole_states_are_gone_on_from(stopped, tmp_path):
    start, problems = stopped.resume(stopped.copy(tmp_path / "run"))
    assert (start.first_step, start.warnings, problems) == (5, (), [])


@pytest.mark.parametrize("left", ["the empty folder", "nothing"])
def test_a_run_without_its_states_does_not_begin_anew(stopped, tmp_path, left):
    run = stopped.copy(tmp_path / "run")
    shutil.rmtree(run / "state")
    if left == "the empty folder":
        (run / "state").mkdir()
    start, [problem] = stopped.resume(run)
    assert start == ResumePoint()
    assert problem.message == f"the run in `{run}` cannot be resumed: its state after step 5 is missing"
    assert problem.hint and problem.hint.endswith(f"or delete `{run}`")


def test_a_run_that_was_killed_before_its_first_save_begins_at_step_0(stopped, tmp_path):
    run = stopped.copy(tmp_path / "run")
    shutil.rmtree(run / "state")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"step": 0, "status": "running", "checkpoints": []}))
    start, problems = stopped.resume(run)
    assert not problems
    notes = ("starts at step 0: the previous run was stopped before its first save",)
    assert start == ResumePoint(0, notes, fused_optimizer=False)


def test_from_the_state_before_it_the_run_ends_with_the_same_weights(stopped, tmp_path, tiny_models, says):
    run = stopped.copy(tmp_path / "run")
    flip(0.9)(run / "state/step-5/optimizer.safetensors", run)
    flags = FLAGS | {
        "dataset_base_path": str(stopped.plan.parameters.dataset_base_path), "output_path": str(run), "resume": "auto"
    }  # fmt: skip
    plan = make_plan(resolve(flags), SilentReporter(), base=tiny_models)
    reporter = _Warnings()
    train(plan, reporter, StopRequest())
    says("\n".join(reporter.messages))
    last = "epoch-0.safetensors" if (run / "epoch-0.safetensors").exists() else "step-8.safetensors"
    one, other = load_file(run / last), load_file(stopped.through / last)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))
    assert sorted(path.name for path in (run / "state").iterdir()) == ["step-6", "step-8"]


class _Warnings(SilentReporter):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def warn(self, message: str) -> None:
        self.messages.append(message)


def test_the_dry_run_tells_what_resuming_will_do(stopped, tmp_path, cli, says):
    run = stopped.copy(tmp_path / "run")
    flip(0.9)(run / "state/step-5/optimizer.safetensors", run)
    words = [word for name, value in FLAGS.items() for word in (f"--{name}", value)]
    common = ("train", *words, "--dataset_base_path", stopped.plan.parameters.dataset_base_path, "--output_path", run)
    reported = cli(*common, "--resume", "auto", "--dry_run")
    assert reported.code == 0, reported.err
    lines = [line for line in reported.out.splitlines() if "after step" in line]
    assert "step 5" in lines[1] and "`optimizer.safetensors`: checksum mismatch" in lines[1]
    says("\n".join(lines))
    shutil.rmtree(run / "state/step-4")
    refused = cli(*common, "--resume", "auto")
    assert refused.code == 1 and "cannot be resumed" in refused.err
    says(refused, r"Reading.*\n", r"Checking.*\n")


def test_the_other_run_has_states_of_its_own(stopped):
    """Otherwise `of another run` would prove nothing."""
    for file in FILES:
        assert (stopped.folder / "state/step-5" / file).read_bytes() != (
            stopped.other / "state/step-5" / file
        ).read_bytes()

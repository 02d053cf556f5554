"""A run that may take so long stops in time, saved, and goes on to the bit."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffsynth_core.config.resolve import resolve
from diffsynth_core.errors import OutOfTime
from diffsynth_core.planning.plan import make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.session import Session
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.loop import train
from diffsynth_core.training.observers.observer import Observer, StepReport
from tests.runs.test_processes import launch
from tests.runs.test_session import STAGES

COMMON = ("--recipe", "qwen-image-lora", "--dataset_num_workers", "0", "--lora_rank", "2", "--learning_rate", "0.01")
ENDLESS = ("--dataset_repeat", "1000000")
CONTINUE = "continue with `--resume auto`"


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def losses_of(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


class LimitAfter(Observer):
    """Leaves so little time after a step."""

    def __init__(self, stop: StopRequest, step: int, seconds: float) -> None:
        self._stop, self._step, self._seconds = stop, step, seconds

    def on_step(self, report: StepReport) -> None:
        if report.step == self._step:
            self._stop.limit_time(self._seconds)


@pytest.fixture
def plan(tiny_models, photographs, tmp_path, monkeypatch):
    """The plan of a run of 6 steps in a folder of this name."""
    monkeypatch.chdir(tmp_path)

    def plan(name: str, **more: object):
        flags = {"recipe": "qwen-image-lora", "dataset_base_path": str(photographs), "max_steps": 6, "device": "cpu",
                 "dataset_num_workers": 0, "lora_rank": 2, "learning_rate": 0.01, "lr_scheduler": "cosine",
                 "output_path": name, **more}  # fmt: skip
        return make_plan(resolve(flags), SilentReporter(), base=tiny_models)

    return plan


def test_a_run_that_was_out_of_time_goes_on_to_the_bit(plan):
    stop = StopRequest()
    with pytest.raises(OutOfTime) as caught:
        train(plan("pieces"), SilentReporter(), stop, observers=[LimitAfter(stop, 3, seconds=0.1)])
    (problem,) = caught.value.problems
    said = "stopped after step 4 of 6 because of `--max_time`; the run is saved in `pieces`"
    assert (problem.message, problem.hint, caught.value.exit_code) == (said, CONTINUE, 0)
    record = record_of(Path("pieces"))
    assert (record["status"], record["step"], record["failure"]) == ("interrupted", 4, None)
    assert [entry["file"] for entry in record["checkpoints"]] == ["step-4.safetensors"]
    train(plan("pieces", resume="auto"), SilentReporter(), StopRequest())
    train(plan("through"), SilentReporter(), StopRequest())
    assert losses_of(Path("pieces")) == losses_of(Path("through"))
    pieces, through = (load_file(Path(name) / "epoch-0.safetensors") for name in ("pieces", "through"))
    assert all(torch.equal(pieces[name], through[name]) for name in through)


def test_time_enough_changes_nothing(plan):
    stop = StopRequest()
    result = train(plan("run"), SilentReporter(), stop, observers=[LimitAfter(stop, 3, seconds=600)])
    assert (result.record.status, result.record.step) == ("completed", 6)


def test_it_stops_before_a_step_that_could_not_be_saved_in_time(plan):
    """The save is assumed to take a second."""
    train(plan("run", max_steps=1), SilentReporter(), StopRequest())
    late, stop = plan("run", resume="auto"), StopRequest()
    stop.limit_time(0.9)
    with pytest.raises(OutOfTime, match="stopped after step 1 of 6"):
        train(late, SilentReporter(), stop)
    assert (record_of(Path("run"))["status"], len(losses_of(Path("run")))) == ("interrupted", 1)


def test_it_stops_while_encoding_and_keeps_what_is_encoded(cli, photographs, tmp_path):
    common = ("train", *COMMON, "--dataset_base_path", photographs, "--output_path", "out", "--cache_path", "cache")
    outcome = cli(*common, "--max_time", "0.001s", "--max_steps", 1)
    assert (outcome.code, outcome.out) == (0, "")
    said = "Stopped before the first step because of `--max_time`; finished encodings are kept; rerun the command"
    assert said in " ".join(outcome.err.split())
    assert not (tmp_path / "out").exists()
    assert cli(*common, "--max_steps", 1).code == 0


def test_no_later_stage_begins(tiny_models, photographs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny_models))
    Path("staged.yaml").write_text(STAGES)
    session = Session.of(config="staged.yaml", dataset_base_path=str(photographs), output_path="out", max_time="1h")
    stop = StopRequest()
    results = session.train(stop=stop)
    assert next(results).stage == "high" and stop.limits_time
    stop.limit_time(0)
    with pytest.raises(OutOfTime) as caught:
        next(results)
    (problem,) = caught.value.problems
    assert problem.message.startswith("stage low: stopped before the first step") and problem.hint == CONTINUE
    assert not Path("out/low/state").exists()


@pytest.mark.slow
def test_the_command_is_over_in_time(cli, photographs):
    begun = time.monotonic()
    outcome = cli("train", *COMMON, *ENDLESS, "--dataset_base_path", photographs, "--max_time", "20s")
    took = time.monotonic() - begun
    folder = Path("models/train/qwen-image-lora")
    record = record_of(folder)
    said = (
        f"Stopped after step {record['step']} of {record['total_steps']} because of `--max_time`; the run is saved in "
        f"`{folder}`; {CONTINUE}"
    )
    assert outcome.code == 0 and said in " ".join(outcome.err.split()) and said in (folder / "train.log").read_text()
    assert len(losses_of(folder)) == record["step"] > 0
    assert took < 20 + 10, "planning takes some time besides"


@pytest.mark.long
def test_two_processes_stop_after_the_same_step(tiny_models, photographs, tmp_path):
    flags = [*COMMON, *ENDLESS, "--num_processes", "2", "--max_time", "20s", "--save_steps", "7"]
    flags += ["--dataset_base_path", str(photographs), "--output_path", str(tmp_path / "out")]
    process = launch(flags, tiny_models, tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    record = record_of(tmp_path / "out")
    assert errors.count("Stopped after step") == 1, errors
    assert (record["status"], len(losses_of(tmp_path / "out"))) == ("interrupted", record["step"])

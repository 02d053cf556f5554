"""Real runs in stages: one after the other, each in its folder, and the effect of a second command."""

import gc
import json
import signal
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STAGED = """
extends: qwen-image-lora
parameters:
  dataset_num_workers: 0
  dataset_repeat: 1
  num_epochs: 1
  lora_rank: 4
  device: cpu
stages:
  high:
    parameters: {max_timestep_boundary: 0.4, learning_rate: 1e-3}
  low:
    parameters: {min_timestep_boundary: 0.4, learning_rate: 2e-3}
"""


@pytest.fixture
def train(cli, photographs, tmp_path):
    """Train in stages, into `out` by default."""
    (tmp_path / "staged.yaml").write_text(STAGED, encoding="utf-8")

    def run(*arguments: object):
        common = ("--config", tmp_path / "staged.yaml", "--dataset_base_path", photographs, "--output_path", "out")
        return cli("train", *common, *arguments)

    return run


def record_of(stage: str, folder: str = "out") -> dict:
    return json.loads(Path(folder, stage, "run.json").read_text())


def metrics_of(stage: str) -> list[dict]:
    return [json.loads(line) for line in Path("out", stage, "metrics.jsonl").read_text().splitlines()]


def contents() -> dict[str, int]:
    """Return every file below the working folder, with its modification time."""
    return {str(path): path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()}


def signal_in_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Send SIGTERM to this process at the end of a step, counted over all stages: the next step is the last one."""
    from diffsynth_core.training.engines.replicated import ReplicatedEngine

    real, calls = ReplicatedEngine.gradient_norm, []

    def stopping(self):
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        return real(self)

    monkeypatch.setattr(ReplicatedEngine, "gradient_norm", stopping)


def test_stages_train_one_after_the_other_each_in_its_folder(train):
    outcome = train()
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines() == [
        f"{title:<12}{value}"
        for stage in ("high", "low")
        for title, value in (
            ("Stage", stage),
            ("Checkpoint", f"out/{stage}/epoch-0.safetensors"),
            ("Metrics", f"out/{stage}/metrics.jsonl"),
            ("Page", f"out/{stage}/report.html"),
            ("Log", f"out/{stage}/train.log"),
        )
    ]
    said = [outcome.err.index(words) for words in ("Stage high\n", "Saved `out/high", "Stage low\n", "Saved `out/low")]
    assert said == sorted(said)
    for stage, rate, low, high in (("high", 1e-3, 0.0, 0.4), ("low", 2e-3, 0.4, 1.0)):
        record = record_of(stage)
        assert (record["status"], record["step"], record["parameters"]["only"]) == ("completed", 4, stage)
        assert record["parameters"]["output_path"] == f"out/{stage}"
        assert record["parameters"]["min_timestep_boundary"] == low
        assert record["parameters"]["max_timestep_boundary"] == high
        assert {line["lr"] for line in metrics_of(stage)} == {rate}
    assert sorted(path.name for path in Path("out").iterdir()) == ["high", "low"]


def test_each_log_tells_of_its_own_stage(train):
    assert train().code == 0
    high, low = (Path("out", stage, "train.log").read_text() for stage in ("high", "low"))
    assert "Stage high" in high and "Stage low" not in high and "out/low" not in high
    assert "Stage low" in low and "Stage high" not in low and "out/high" not in low
    assert "4 of 4 encodings are in the cache; vae is not loaded" in low


def test_a_stage_trains_what_it_would_train_alone(train):
    assert train().code == 0
    for stage in ("low", "high"):
        assert train("--only", stage, "--output_path", "alone").code == 0
        together, alone = (load_file(f"{folder}/{stage}/epoch-0.safetensors") for folder in ("out", "alone"))
        assert together.keys() == alone.keys()
        assert all(torch.equal(together[name], alone[name]) for name in together)


def test_nothing_of_a_stage_is_in_memory_in_the_next(train, monkeypatch):
    """Without relying on an accidental collection: accelerate creates reference cycles with a model."""
    from diffsynth_core.training import setup

    real, built, alive = setup.build_training_module, [], []

    def build(*arguments):
        alive.append([reference() is not None for reference in built])
        module = real(*arguments)
        built.append(weakref.ref(module))
        return module

    monkeypatch.setattr(setup, "build_training_module", build)
    gc.disable()
    try:
        outcome = train("--mixed_precision", "bf16")
    finally:
        gc.enable()
    assert outcome.code == 0, outcome.err
    assert alive == [[], [False]]


def test_one_stage_alone(train):
    outcome = train("--only", "low", "--max_timestep_boundary", 0.9)
    assert outcome.code == 0, outcome.err
    assert [path.name for path in Path("out").iterdir()] == ["low"]
    assert record_of("low")["parameters"]["max_timestep_boundary"] == 0.9


def test_what_is_wrong_with_the_second_stage_is_told_before_the_first_runs(train):
    Path("out").mkdir()
    Path("out/low").write_text("a file")
    outcome = train()
    assert outcome.code == 2
    assert outcome.err.count("error: ") == 1 and "error: stage low: `output_path` `out/low` is a file" in outcome.err
    assert list(contents()) == ["out/low"]


def test_both_folders_that_hold_a_run_are_told(train):
    assert train().code == 0
    before = contents()
    outcome = train()
    assert outcome.code == 2
    reported = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert reported == [
        f"error: stage {stage}: `output_path` `out/{stage}` already holds a run (completed, 4 of 4 steps)"
        for stage in ("high", "low")
    ]
    assert contents() == before


def test_a_complete_stage_is_passed_over_and_the_next_begins(train):
    assert train("--only", "high").code == 0
    before = contents()
    refused = train()
    assert refused.code == 2 and "`out/high` already holds a run" in refused.err and "out/low" not in refused.err
    outcome = train("--resume", "auto")
    assert outcome.code == 0, outcome.err
    line = "Stage high is skipped: the run in `out/high` has completed 4 steps and the parameters request 4; "
    assert line in outcome.err and "Stage high\n" not in outcome.err
    assert outcome.out.startswith("Stage       low\nCheckpoint  out/low/epoch-0.safetensors\n")
    assert record_of("low")["status"] == "completed"
    assert before.items() <= contents().items(), "the first stage was touched"


def test_a_dry_run_passes_over_a_complete_stage_too(train):
    assert train("--only", "high").code == 0
    outcome = train("--resume", "auto", "--dry_run")
    assert outcome.code == 0, outcome.err
    assert "Stage high is skipped" in outcome.err
    assert outcome.out.startswith("Stage low\n") and "out/high" not in outcome.out


def test_when_all_are_complete_nothing_is_left_to_do(train):
    assert train().code == 0
    outcome = train("--resume", "auto")
    assert outcome.code == 0 and outcome.out == ""
    for stage in ("high", "low"):
        assert f"Stage {stage} is skipped: the run in `out/{stage}` has completed 4 steps" in outcome.err
    assert outcome.err.endswith("Nothing left to do\n")
    more = train("--resume", "auto", "--num_epochs", 2)
    assert more.code == 0, more.err
    assert [record_of(stage)["step"] for stage in ("high", "low")] == [8, 8]


def test_a_complete_stage_does_not_hide_what_is_wrong_with_the_other(train):
    assert train("--only", "high").code == 0
    Path("out/low").write_text("a file")
    outcome = train("--resume", "auto")
    assert outcome.code == 2
    assert "error: stage low: `output_path` `out/low` is a file" in outcome.err and outcome.err.count("error: ") == 1


def test_a_stop_in_the_first_stage_ends_the_session_and_resume_does_the_rest(train, monkeypatch):
    with monkeypatch.context() as patch:
        signal_in_step(patch, 1)
        outcome = train()
    assert outcome.code == 143
    assert "Interrupted after step 2 of 4; the run is saved in `out/high`" in outcome.err
    assert "; continue with `--resume auto`" in outcome.err
    assert record_of("high")["status"] == "interrupted"
    assert not Path("out/low").exists() and "Stage low" not in outcome.err and outcome.out == ""
    resumed = train("--resume", "auto")
    assert resumed.code == 0, resumed.err
    assert "resumed after step 2" in resumed.err and "skipped" not in resumed.err
    assert [record_of(stage)["status"] for stage in ("high", "low")] == ["completed", "completed"]
    assert [line["step"] for line in metrics_of("high")] == [1, 2, 3, 4]
    assert train("--output_path", "through").code == 0
    for stage in ("high", "low"):
        pieces, through = (load_file(f"{folder}/{stage}/epoch-0.safetensors") for folder in ("out", "through"))
        assert all(torch.equal(pieces[name], through[name]) for name in through)


def test_a_stop_in_the_second_stage(train, monkeypatch):
    with monkeypatch.context() as patch:
        signal_in_step(patch, 5)
        outcome = train()
    assert outcome.code == 143
    assert "Stage low: interrupted after step 2 of 4; the run is saved in `out/low`" in outcome.err
    assert [record_of(stage)["status"] for stage in ("high", "low")] == ["completed", "interrupted"]
    resumed = train("--resume", "auto")
    assert resumed.code == 0, resumed.err
    assert "Stage high is skipped" in resumed.err and "resumed after step 2" in resumed.err
    assert record_of("low")["status"] == "completed"


def test_a_stop_in_the_last_step_of_a_stage_begins_no_other(train, monkeypatch):
    """The current stage is complete; the same command again would be rejected, but not with `--resume auto`."""
    with monkeypatch.context() as patch:
        signal_in_step(patch, 4)
        outcome = train()
    assert outcome.code == 143
    assert "Stage low: interrupted before the first step" in outcome.err
    assert "; continue with `--resume auto`" in outcome.err
    assert record_of("high")["status"] == "completed"
    assert "Stage low\n" not in outcome.err and not Path("out/low").exists()
    assert train("--resume", "auto").code == 0


def test_a_failure_in_the_first_stage_begins_no_other(train, monkeypatch):
    from diffsynth_core.training.engines.replicated import ReplicatedEngine

    monkeypatch.setattr(ReplicatedEngine, "gradient_norm", lambda self: torch.tensor(torch.nan))
    outcome = train()
    assert outcome.code == 1 and "not finite in step 1" in outcome.err
    assert record_of("high")["status"] == "failed" and not Path("out/low").exists()


def test_each_stage_is_rehearsed_and_proved(train):
    outcome = train("--rehearse", "--max_steps", 2)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    for stage in ("high", "low"):
        start = lines.index(f"The rehearsal of stage {stage} proved:")
        assert "each of its 42 keys matches one of 21 modules of dit" in lines[start + 4]
        assert lines[start + 5] == f"Stage       {stage}"
        assert lines[start + 6] == f"Checkpoint  out/{stage}/epoch-0.safetensors"
        assert record_of(stage)["status"] == "completed"
    assert lines.count("The real run:") == 1 and lines.index("The real run:") > lines.index("Stage       low")
    assert "Stage low" not in Path("out/high/train.log").read_text()


def test_a_rehearsal_tells_what_is_wrong_with_any_stage_before_it_begins(train):
    Path("out").mkdir()
    Path("out/low").write_text("a file")
    outcome = train("--rehearse", "--max_steps", 2)
    assert outcome.code == 2 and "error: stage low: `output_path` `out/low` is a file" in outcome.err
    assert list(contents()) == ["out/low"] and outcome.out == ""


def test_a_stopped_rehearsal_begins_no_other_stage(train, monkeypatch):
    signal_in_step(monkeypatch, 4)
    outcome = train("--rehearse", "--max_steps", 4)
    assert outcome.code == 143
    assert "The rehearsal was interrupted" in outcome.err and "--resume" not in outcome.err
    assert "Stage low\n" not in outcome.err and not Path("out/low").exists()

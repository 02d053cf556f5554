"""Runs that lose their terminal, reader or log: no step and no save is lost, and no process remains.

`DIFFSYNTH_TEST_KILLS=40` tries each without data workers too.
"""

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from diffsynth_cli.main import main
from tests.killing import GONE_SECONDS, ForkedRun, steps_done

STEPS = 12
LOST_AFTER = 2
"""Steps after which the terminal is lost."""
WORKERS = (0, 8) if int(os.environ.get("DIFFSYNTH_TEST_KILLS", "0")) > 8 else (8,)


@pytest.fixture(scope="module")
def start(tiny_models, photographs, tmp_path_factory):
    """Start a run in a folder, forked from this process after it has imported everything."""

    def words(output: Path, workers: int) -> list[str]:
        data = ["--dataset_base_path", str(photographs), "--dataset_repeat", "5", "--dataset_num_workers", str(workers)]
        run = ["--recipe", "qwen-image-lora", "--max_steps", str(STEPS), "--device", "cpu"]
        return [*run, *data, "--output_path", str(output)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny_models))
        assert main(["train", *words(tmp_path_factory.mktemp("first") / "out", 0)]) == 0
    return lambda folder, workers, **streams: ForkedRun(words(folder / "out", workers), tiny_models, folder, **streams)


def ended(run: ForkedRun, folder: Path) -> tuple[int, str, int, bool]:
    """Return exit code, status and step of the record, and whether the state of that step exists; no process is
    left.
    """
    code = run.process.wait()
    run.wait_until_gone(GONE_SECONDS)
    record = json.loads((folder / "out" / "run.json").read_text())
    state = folder / "out" / "state" / f"step-{record['step']}" / "state.json"
    return code, record["status"], record["step"], state.is_file()


def log_of(folder: Path) -> str:
    return (folder / "out" / "train.log").read_text()


def lose(ours: int, run: ForkedRun, folder: Path) -> None:
    """Read the output of a run until training is in progress, then stop reading."""
    os.set_blocking(ours, False)

    def far_enough() -> bool:
        with suppress(BlockingIOError):
            os.read(ours, 65536)
        return steps_done(folder / "out") >= LOST_AFTER

    assert run.wait_until(far_enough)
    os.close(ours)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_terminal_that_goes_away_ends_a_run_after_saving(start, tmp_path, workers):
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "wb", buffering=0) as stream:
        started = start(tmp_path, workers, stderr=stream, ours=ours, terminal=True)
    with started as run:
        lose(ours, run, tmp_path)
        code, status, step, saved = ended(run, tmp_path)
    assert (code, status, saved) == (129, "interrupted", True)
    last = log_of(tmp_path).splitlines()[-1]
    assert last.endswith(
        f"Interrupted after step {step} of {STEPS}; the run is saved in `{tmp_path / 'out'}`; continue with `--resume auto`"
    )


@pytest.mark.parametrize("workers", WORKERS)
def test_a_reader_that_is_gone_changes_nothing(start, tmp_path, workers):
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb", buffering=0) as stream:
        started = start(tmp_path, workers, stderr=stream, ours=reader)
    with started as run:
        lose(reader, run, tmp_path)
        assert ended(run, tmp_path) == (0, "completed", STEPS, True)
    assert f"Training: {STEPS} of {STEPS} steps, loss " in log_of(tmp_path)
    assert f"Checkpoint  {tmp_path / 'out' / 'epoch-0.safetensors'}" in log_of(tmp_path)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_full_disk_behind_the_output_changes_nothing(start, tmp_path, workers):
    with Path("/dev/full").open("w") as full, start(tmp_path, workers, stderr=full) as run:
        assert ended(run, tmp_path) == (0, "completed", STEPS, True)
    assert f"Training: {STEPS} of {STEPS} steps, loss " in log_of(tmp_path)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_log_that_cannot_be_written_is_told_once(start, tmp_path, workers):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.log").symlink_to("/dev/full")
    with start(tmp_path, workers) as run:
        assert ended(run, tmp_path) == (0, "completed", STEPS, True)
    what = f"warning: `{tmp_path / 'out' / 'train.log'}` cannot be written: No space left on device; the run continues without it"
    assert run.stderr().count(what) == 1 and "error: " not in run.stderr()


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_is_no_error(start, tmp_path, says, number, workers):
    with start(tmp_path, workers) as run:
        assert run.wait_until(lambda: steps_done(tmp_path / "out") >= LOST_AFTER)
        os.kill(run.process.pid, number)
        code, status, step, saved = ended(run, tmp_path)
    assert (code, status, saved) == (128 + number, "interrupted", True)
    assert f"Interrupted after step {step} of {STEPS}; " in run.stderr() and "error: " not in run.stderr()
    if workers:  # it is the same without
        patterns = (r"step.\d+", r"\d+ of", r"\S+ [kM]B", "loss .*", "taken .*")
        says("\n".join(run.stderr().splitlines()[-5:]), *patterns)
    assert log_of(tmp_path).splitlines()[-1].endswith(run.stderr().splitlines()[-1])

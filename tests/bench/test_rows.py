"""Time of a dry run that rejects thousands of rows, and of one that reads as many valid ones."""

import contextlib
import io
import time
from pathlib import Path

import pytest
from PIL import Image

from diffsynth_cli.main import main

EIGHTH, FULL, SMALL = 8, 20_000, 800
GOOD = 100_000
ROUNDS = 3


def write_bad_rows(folder: Path, count: int) -> Path:
    """Write a dataset all of whose files are missing."""
    folder.mkdir()
    lines = (f"missing_{number}.png,caption {number}\n" for number in range(count))
    (folder / "metadata.csv").write_text("image,prompt\n" + "".join(lines))
    return folder


def dry_run(dataset: Path) -> tuple[int, str]:
    """Return the exit code and the report of a dry run."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(["train", "--recipe", "qwen-image-lora", "--device", "cpu", "--dry_run",
                     "--dataset_base_path", str(dataset)])  # fmt: skip
    return code, said.getvalue()


def seconds_of(dataset: Path, rounds: int) -> float:
    """Return the minimum over some rounds."""
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        code, said = dry_run(dataset)
        taken.append(time.perf_counter() - started)
        assert code == 1 and len(said.splitlines()) < 80, said[-2000:]  # of all faults a few are printed
    return min(taken)


def write_good_rows(folder: Path, count: int) -> Path:
    """Write a dataset whose rows all name one image: rows are measured, not files."""
    folder.mkdir()
    Image.new("RGB", (512, 384), (90, 10, 200)).save(folder / "a.png")
    lines = (f"a.png,caption {number}\n" for number in range(count))
    (folder / "metadata.csv").write_text("image,prompt\n" + "".join(lines))
    return folder


@pytest.mark.parametrize(("write", "rows", "limit"), [(write_bad_rows, FULL, 3), (write_good_rows, GOOD, 1.5)])
def test_rows_take_time_in_proportion_to_their_number(
    tmp_path, monkeypatch: pytest.MonkeyPatch, bench, write, rows, limit
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    count = bench.size(rows, SMALL)
    few, many = write(tmp_path / "few", count // EIGHTH), write(tmp_path / "many", count)
    dry_run(few)  # what is imported is imported by now
    rounds = bench.rounds(ROUNDS)
    small, large = seconds_of(few, rounds), seconds_of(many, rounds)
    kind = write.__name__.split("_")[1]
    what = f"a dry run of {count:,} {kind} rows / one of {count // EIGHTH:,}, eight times"
    bench.at_most(what, large / (EIGHTH * small), limit, f"{small:.2f} s, {large:.2f} s")

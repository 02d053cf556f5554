"""The observer of the page: how often it writes, and that it never ends a run."""

import json
import shutil
from pathlib import Path

import pytest

from diffsynth_core.checkpoints.run_folder import METRICS, PAGE, RECORD
from diffsynth_core.training.observers import page
from diffsynth_core.training.observers.observer import StepReport, ValidationReport
from diffsynth_core.training.observers.page import PageObserver
from tests.naming import names
from tests.run_folders import metric_lines, write_run

STEP = StepReport(5, 0, 20, 0.1, 1e-4, 0.3, 1.0, 0.0)
VALIDATION = ValidationReport(5, 0.1, (0.1,))


class Clock:
    """Stands for the clock; each page takes `cost` seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: float) -> None:
        self.now, self.written = 1000.0, []
        monkeypatch.setattr(page.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(page, "write_page", lambda *_: self._write(cost))

    def _write(self, cost: float) -> None:
        self.written.append(self.now)
        self.now += cost


@pytest.mark.parametrize(("cost", "pause"), [(0.01, 10), (0.5, 50)])
def test_steps_write_at_most_one_percent_of_the_time(tmp_path, monkeypatch, cost, pause):
    clock = Clock(monkeypatch, cost)
    observer = PageObserver(write_run(tmp_path / "run", 4, 9), pytest.fail)
    for _ in range(2000):
        clock.now += 0.1
        observer.on_step(STEP)
    gaps = [later - earlier - cost for earlier, later in zip(clock.written, clock.written[1:], strict=False)]
    assert gaps and min(gaps) >= pause - 1e-6 and max(gaps) < pause + 0.2


def test_what_happens_seldom_is_shown_at_once_if_time_allows(tmp_path, monkeypatch):
    clock = Clock(monkeypatch, 0.01)
    observer = PageObserver(write_run(tmp_path / "run", 4, 9), pytest.fail)
    observer.on_save(Path("a"), 4)
    clock.now += 0.5
    observer.on_validation(VALIDATION)
    assert len(clock.written) == 1, "not before 100 times as long as a page takes"
    clock.now += 0.6
    observer.on_validation(VALIDATION)
    assert len(clock.written) == 2
    clock.now += 1.1
    observer.on_preview(Path("a"), 5)
    assert len(clock.written) == 3
    observer.on_end()
    assert len(clock.written) == 4, "the end is always shown"


def test_the_page_shows_the_files_of_the_run(tmp_path):
    folder = write_run(tmp_path / "run", 4, 9)
    observer = PageObserver(folder, pytest.fail)
    assert "Running: 4 of 9" in (folder / PAGE).read_text()
    with (folder / METRICS).open("a") as stream:
        stream.writelines(f"{line}\n" for line in metric_lines(5, 9, 9))
    content = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(content | {"status": "completed", "step": 9}))
    observer.on_end()
    assert "Completed: 9 of 9" in (folder / PAGE).read_text()


def test_a_page_that_cannot_be_written_is_reported_once(tmp_path):
    folder = write_run(tmp_path / "run", 4, 9)
    (folder / PAGE).mkdir()
    warnings: list[str] = []
    observer = PageObserver(folder, warnings.append)
    observer.on_end()
    (warning,) = warnings
    assert warning == names(folder / PAGE, "is not up to date", "the run continues")


def test_a_folder_that_was_removed_is_not_made_again(tmp_path):
    folder = write_run(tmp_path / "run", 4, 9)
    observer = PageObserver(folder, pytest.fail)
    shutil.rmtree(folder)
    observer.on_end()
    assert not folder.exists()
    folder.mkdir()
    observer.on_end()
    assert list(folder.iterdir()) == []

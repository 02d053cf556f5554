"""The framework of the dataset checks: codes, levels, order, workers that hang or crash."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from diffsynth_core.data.findings import CODES, LEVELS, SUBJECTS, finding
from diffsynth_core.dataset_report import inspect
from diffsynth_core.dataset_report.inspect import Job, inspect_files
from diffsynth_core.dataset_report.report import in_order
from diffsynth_core.dataset_report.rules import Rules
from diffsynth_core.dataset_report.validate import CheckOptions, validate
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.progress import SilentReporter


def test_every_code_has_a_subject_a_level_and_an_explanation() -> None:
    assert {code.subject for code in CODES.values()} == set(SUBJECTS)
    assert {code.level for code in CODES.values()} == set(LEVELS)
    assert all(code.explanation and not code.explanation.endswith(".") for code in CODES.values())


def test_the_worst_comes_first() -> None:
    findings = [finding("BUCKETS", "c"), finding("IMAGE_ALPHA", "b", row=2), finding("PATH_MISSING", "a", row=9)]
    findings.append(finding("IMAGE_ALPHA", "b", row=1))
    assert [(one.code, one.row) for one in in_order(findings)] == [
        ("PATH_MISSING", 9),
        ("IMAGE_ALPHA", 1),
        ("IMAGE_ALPHA", 2),
        ("BUCKETS", None),
    ]


def _hang_or_crash(job: Job, name: str) -> inspect.Facts:
    """Replaces a decoder with a bug."""
    if name == "hangs":
        time.sleep(60)
    if name == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    return inspect.ImageFacts(name, 1)


def _work_badly(job: Job, line, parent: int) -> None:
    inspect.EXAMINERS = {"image": _hang_or_crash}
    inspect.work(job, line, parent)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_hanging_and_a_crashing_file_end_nothing(tmp_path: Path, monkeypatch, workers: int) -> None:
    monkeypatch.setattr(inspect, "WORK", _work_badly)
    names = ["first", "hangs", "second", "crashes", "third"]
    facts = inspect_files(Job(tmp_path), dict.fromkeys(names, "image"), workers, 2.0, SilentReporter())
    assert list(facts) == names
    faults = {name: one.fault and one.fault.reason for name, one in facts.items()}
    assert faults == {
        "first": None,
        "hangs": "timed out after 2 s (`--file_timeout`)",
        "second": None,
        "crashes": "the decoder crashed",
        "third": None,
    }


def test_a_worker_starts_without_numpy_and_the_decoder_of_videos() -> None:
    script = (
        "import sys, diffsynth_core.dataset_report.inspect; print({'numpy', 'imageio_ffmpeg'} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"


def _never_work(job: Job, line, parent: int) -> None:
    raise SystemExit(1)


def test_workers_that_do_not_start_are_no_fault_of_a_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(inspect, "WORK", _never_work)
    with pytest.raises(DiffSynthError) as raised:
        inspect_files(Job(tmp_path), {"first": "image"}, 1, 2.0, SilentReporter())
    (problem,) = raised.value.problems
    assert problem.message == "cannot start a process to decode files: it exited immediately"
    assert problem.hint == "free some memory, or skip decoding with `--depth paths`"


def test_a_folder_with_captions_is_checked_to_the_pixels(tmp_path: Path) -> None:
    Image.effect_noise((96, 64), 50).convert("RGB").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a noise")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    (tmp_path / "b.txt").write_text("another")
    report, dataset = validate(tmp_path, Rules(), CheckOptions(), SilentReporter())
    assert {(one.code, one.row, one.path) for one in report.findings} == {
        ("IMAGE_TRUNCATED", 2, "b.png"),
        ("BUCKETS", None, None),
    }
    assert (dataset.images["a.png"].width, dataset.images["a.png"].height) == (96, 64)
    assert report.exit_code == 1

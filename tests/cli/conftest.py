"""Shared fixtures of the command-line tests: rejections as values, and command lines that are parsed but not run."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.snapshots import Say

HubAccessError = tuple[int, list[tuple[str, str | None]]]
"""Exit code, and (message, hint) of every problem in report order."""


@pytest.fixture
def refuse(cli, says: Say, dataset: Path, models: Path, tmp_path: Path) -> Callable[..., HubAccessError]:
    """Start a LoRA run that must be rejected before reading weights, without a traceback, writing nothing.

    Its report goes to the page of the test; `hide` are the patterns of `says`.
    """

    def run(*arguments: object, recipe: str | None = "qwen-image-lora", hide: tuple[str, ...] = ()) -> HubAccessError:
        start = ("--recipe", recipe) if recipe else ()
        settings = ("--device", "cpu", "--dataset_num_workers", 0, "--max_steps", 1, "--dataset_base_path", dataset)
        before = stamps(tmp_path)
        outcome = cli("train", *start, *settings, *arguments)
        assert outcome.code != 0, f"was not refused:\n{outcome.err}"
        assert "Traceback" not in outcome.err and outcome.out == ""
        assert "Loading" not in outcome.err, outcome.err
        assert stamps(tmp_path) == before
        says(f"exit code {outcome.code}\n{without_progress(outcome.err)}", *hide)
        return outcome.code, read_problems(outcome.err)

    return run


def without_progress(text: str) -> str:
    """What a command said, without the lines that count and time."""
    return re.sub(r"^.* of .*/s, .* left\n", "", text, flags=re.MULTILINE)


def stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return size and time of everything below a folder: a file that was created and deleted changes its folder's
    time.
    """
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def read_problems(report: str) -> list[tuple[str, str | None]]:
    """Return the problems of a report on stderr; if there are several, its last line must count them.

    Problems of one kind are indented below one `error: `, and share the hint after them.
    """
    lines = report.splitlines()
    problems: list[tuple[str, str | None]] = []
    kind: list[str] = []
    for line in lines:
        if line.startswith("error: "):
            problems += [(message, None) for message in kind]
            kind = [line.removeprefix("error: ")]
        elif kind and line.startswith(" " * 7):
            kind.append(line.strip())
        elif line.startswith("  hint: "):
            problems += [(message, line.removeprefix("  hint: ")) for message in kind]
            kind = []
    problems += [(message, None) for message in kind]
    assert problems, report
    if len(problems) > 1:
        assert lines[-1] == f"{len(problems)} problems"
    return problems


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], Path]:
    """Write a config file."""

    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def parse_stages(cli, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple]:
    """Return the resolved stages of a `train` command line, without running them."""
    seen: list[tuple] = []
    monkeypatch.setattr("diffsynth_cli.train_session.run_session", lambda stages, *_: seen.append(stages) or 0)

    def run(*arguments: object) -> tuple:
        outcome = cli("train", *arguments)
        assert outcome.code == 0, outcome.err
        return seen.pop()

    return run


@pytest.fixture
def parse(parse_stages) -> Callable[..., object]:
    """Return the resolved parameters of a `train` command line without stages."""

    def run(*arguments: object) -> object:
        (resolved,) = parse_stages(*arguments)
        return resolved

    return run

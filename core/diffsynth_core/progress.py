"""Messages and progress of the engine, independent of the terminal, and how numbers are formatted."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

BYTES = "bytes"
"""Unit of work counted in bytes, displayed in kB, MB …"""


class Task(Protocol):
    """A piece of work whose progress can be displayed."""

    def advance(self, amount: int = 1, **fields: str) -> None:
        """Report `amount` more units of work as done; `fields` are short texts to display with the progress."""


class Reporter(Protocol):
    """Receiver of the engine's messages and progress."""

    def info(self, message: str) -> None:
        """Report what happens."""

    def warn(self, message: str) -> None:
        """Report what the user should look at."""

    def log_to(self, path: Path) -> None:
        """Write all messages to a file, including those reported so far."""

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        """Display the progress of `total` units of work, of which `done` are complete, during the block."""
        yield SilentTask()


class SilentTask(Task):
    """A task without display."""

    def advance(self, amount: int = 1, **fields: str) -> None:
        pass


class SilentReporter(Reporter):
    """A reporter that discards everything: for use as a library, and on all ranks but the first."""

    def info(self, message: str) -> None:
        pass

    def warn(self, message: str) -> None:
        pass

    def log_to(self, path: Path) -> None:
        pass

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        yield SilentTask()


def pluralize(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: `1 file`, `2 files`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def verb(number: int, singular: str, plural: str) -> str:
    """Return the form of a verb that agrees with a number of things: `1 of 3 files is`, `2 of 3 files are`."""
    return singular if number == 1 else plural


def format_bytes(count: float) -> str:
    """Format a size on disk in powers of 1000, as disks and download pages count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_duration(seconds: float) -> str:
    """Format a duration in its two largest units: `8 s`, `12 min`, `1 h 8 min`, `2 d 3 h`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours = round(seconds / 3600)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 24 * 60 else f"{hours // 24} d {hours % 24} h"


def format_memory(count: float) -> str:
    """Format an amount of GPU memory in powers of 1024, as nvidia-smi and PyTorch count."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_count(count: float) -> str:
    """Format a number of parameters: `20.4 billion`, `126.9 million`."""
    for size, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if count >= size:
            return f"{count / size:.1f} {word}"
    return str(count)

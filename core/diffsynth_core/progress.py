"""How the engine tells what it is doing, without knowing the terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

BYTES = "bytes"
"""The unit of work that is counted in bytes, which are shown as kB, MB …"""


class Task(Protocol):
    """One piece of work whose progress can be shown."""

    def advance(self, amount: int = 1, **fields: str) -> None:
        """Tell that `amount` more of the work is done; `fields` are short texts to show beside it."""


class Reporter(Protocol):
    """Where messages and progress of the engine go."""

    def info(self, message: str) -> None: ...

    def warn(self, message: str) -> None: ...

    def log_to(self, path: Path) -> None:
        """Keep all messages, those already told too, in a file from here on."""

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        """Show a piece of work of `total` units, `done` of them behind it, while the block runs."""
        yield SilentTask()


class SilentTask:
    """A task nobody watches."""

    def advance(self, amount: int = 1, **fields: str) -> None:
        pass


class SilentReporter:
    """A reporter for programs that use the engine as a library, and for every process but the first."""

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
    """`1 file`, `2 files`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def format_bytes(count: float) -> str:
    """Bytes as people read them, in powers of 1000 as disks and download pages count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_duration(seconds: float) -> str:
    """A duration in its two largest units: `8 s`, `12 min`, `1 h 8 min`, `2 d 3 h`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours = round(seconds / 3600)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 24 * 60 else f"{hours // 24} d {hours % 24} h"


def format_memory(count: float) -> str:
    """Memory of a GPU as nvidia-smi and PyTorch count it, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_count(count: float) -> str:
    """A number of parameters as people say it: `20.4 billion`, `126.9 million`."""
    for size, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if count >= size:
            return f"{count / size:.1f} {word}"
    return str(count)

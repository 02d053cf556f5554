"""Terminal output of the engine: messages, progress bars, and plain lines where there is no terminal."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
)
from rich.text import Text

from diffsynth_cli.printing import echo_line, printable, printable_message
from diffsynth_cli.ranks import log_line, report_log
from diffsynth_cli.text.wrapping import wrap_line
from diffsynth_core.files import LineFile
from diffsynth_core.progress import BYTES, Reporter, SilentTask, Task, format_bytes, format_duration

STATUS_COLUMNS = 80
"""Narrower terminals get plain lines, which may wrap."""
BAR_COLUMNS = 100
"""Narrower terminals get no bar, which would push out the remaining time."""
PLAIN_SECONDS = 5.0
"""Minimum time between two plain lines of one task."""


def color_system() -> Literal["auto"] | None:
    """None if NO_COLOR is set: rich then also drops bold and dim, as the lines of errors.py do."""
    return None if os.environ.get("NO_COLOR") else "auto"


class ConsoleReporter(Reporter):
    """Shows the engine's progress on stderr and writes every message to the log of the run."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        """`quiet`: for all processes of a run but the first."""
        self.quiet = quiet
        self.console = console or Console(file=sys.stderr, highlight=False, quiet=quiet, color_system=color_system())
        self._log: LineFile | None = None
        self._log_path = Path()
        self._early: list[str] = []
        self._bars: Progress | None = None
        self._tasks = 0
        self._changing = threading.Lock()

    def info(self, message: str) -> None:
        shown = wrap_line(printable_message(message), self.console.width if self.console.is_terminal else None)
        self.console.print(Text(shown), soft_wrap=True)
        self.keep(message)

    def warn(self, message: str) -> None:
        self._show_warning(message)
        self.keep(f"warning: {message}")

    def _show_warning(self, message: str) -> None:
        # In one piece: live bars would be drawn over an unfinished line.
        self.console.print(Text.assemble(("warning: ", "yellow"), printable_message(message)), soft_wrap=True)

    def log_to(self, path: Path) -> None:
        self.close()
        try:
            self._log = LineFile(path)
        except OSError as error:
            self._lost_log(path, error)
        self._log_path = path
        report_log(path)
        early, self._early = self._early, []
        for line in early:
            self._write(line)

    def close(self) -> None:
        """Close the log; later messages go to the terminal only."""
        if self._log:
            self._log.close()
            self._log = None

    def result(self, line: str) -> None:
        """Print a line of results to stdout."""
        echo_line(line)
        self.keep(line)

    def keep(self, message: str) -> None:
        """Write a message to the log only."""
        self._write(log_line(message))

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        if total == 0:
            yield SilentTask()
        elif self.console.is_terminal and not self.console.is_dumb_terminal and self.console.width >= STATUS_COLUMNS:
            with _lines(self.keep, label, total, unit, done) as lines, self._shared_bars() as bars:
                bar = _Bar(bars, lines, label, total, unit, done)
                yield bar
                if len(bars.task_ids) > 1:
                    bar.leave()
        else:
            with _lines(self.info, label, total, unit, done) as lines:
                yield lines

    @contextmanager
    def _shared_bars(self) -> Iterator[Progress]:
        """The bars of all tasks that run at the same time, also in threads: a terminal shows only one live display."""
        with self._changing:
            if self._bars is None:
                self._bars = _progress(self.console)
                self._bars.start()
            bars = self._bars
            self._tasks += 1
        try:
            yield bars
        finally:
            with self._changing:
                self._tasks -= 1
                if not self._tasks:
                    bars.stop()
                    self._bars = None

    def _write(self, line: str) -> None:
        if not self._log:
            self._early.append(line)
            return
        try:
            self._log.write(line)
        except OSError as error:
            self._log.close()
            self._log = None
            self._lost_log(self._log_path, error)

    def _lost_log(self, path: Path, error: OSError) -> None:
        """Write to the log, ignoring errors: a log that cannot be written must not end a run."""
        self._show_warning(f"`{path}` cannot be written: {error.strerror}; the run continues without it")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        *([BarColumn(bar_width=12)] if console.width >= BAR_COLUMNS else []),
        TextColumn("{task.fields[count]}", markup=False),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[fields]}", markup=False),
        TextColumn("{task.fields[left]}"),
        console=console,
    )


class _Rate:
    """Units per second since the start."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.done = 0

    def add(self, amount: int) -> float:
        self.done += amount
        return self.done / max(time.monotonic() - self._started, 1e-9)


def _count(done: int, total: int, unit: str, of: str) -> str:
    """The completed amount of a task, in units, or in kB, MB … if the unit is bytes."""
    return f"{format_bytes(done)}{of}{format_bytes(total)}" if unit == BYTES else f"{done}{of}{total} {unit}"


def _time_left(count: int, rate: float) -> str:
    """The estimated remaining time at the average rate so far."""
    return format_duration(count / rate) if rate else "unknown"


def _speed(rate: float, unit: str) -> str:
    return f"{format_bytes(rate)}/s" if unit == BYTES else f"{rate:.2f}/s"


class _Bar:
    """A task shown as a progress bar, which disappears once the task has finished and others have not, and logged as
    lines."""

    def __init__(self, progress: Progress, lines: "_Lines", label: str, total: int, unit: str, done: int) -> None:
        self._lines = lines
        self._progress, self._total, self._unit, self._done, self._rate = progress, total, unit, done, _Rate()
        count = _count(done, total, unit, "/")
        self._task = progress.add_task(
            printable(label), total=total, completed=done, count=count, rate="", fields="", left=""
        )

    def advance(self, amount: int = 1, **fields: str) -> None:
        self._done += amount
        self._lines.advance(amount, **fields)
        rate = self._rate.add(amount)
        self._progress.update(
            self._task,
            advance=amount,
            count=_count(self._done, self._total, self._unit, "/"),
            rate=_speed(rate, self._unit),
            left=f"ETA {_time_left(self._total - self._done, rate)}",
            fields=printable("  ".join(f"{name} {value}" for name, value in fields.items())),
        )

    def leave(self) -> None:
        """Remove the bar."""
        self._progress.remove_task(self._task)


class _Lines:
    """A task shown as lines of text: one every few seconds and one at the end."""

    def __init__(self, say: Callable[[str], None], label: str, total: int, unit: str, done: int) -> None:
        self._say, self._label, self._total, self._unit, self._done = say, label, total, unit, done
        self._rate = _Rate()
        self._last = time.monotonic()
        self._line = ""

    def advance(self, amount: int = 1, **fields: str) -> None:
        self._done += amount
        rate = self._rate.add(amount)
        shown = "".join(f", {name} {value}" for name, value in fields.items())
        count = _count(self._done, self._total, self._unit, " of ")
        self._line = f"{self._label}: {count}{shown}, {_speed(rate, self._unit)}, {_time_left(self._total - self._done, rate)} left"
        if time.monotonic() - self._last >= PLAIN_SECONDS:
            self.finish()

    def finish(self) -> None:
        """Print the line of the last update, once."""
        if self._line:
            self._say(self._line)
            self._last, self._line = time.monotonic(), ""


@contextmanager
def _lines(say: Callable[[str], None], label: str, total: int, unit: str, done: int) -> Iterator[_Lines]:
    """Show a task as lines while the block runs; the last line states the progress however the block ends."""
    lines = _Lines(say, label, total, unit, done)
    try:
        yield lines
    finally:
        lines.finish()

"""stdout and stderr when their reader has exited or their disk is full.

A message must never end the work that it reports: what stderr cannot write is dropped. Data that cannot be written to
stdout is a failure, because it is the purpose of the command.
"""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from diffsynth_core.errors import SIGNAL_EXIT_BASE, DiffSynthError

if TYPE_CHECKING:
    from typing import TextIO


class ReaderGone(DiffSynthError):
    """The program that read stdout, such as `head`, has exited. Nothing is printed, as with other tools."""

    exit_code = SIGNAL_EXIT_BASE + signal.SIGPIPE

    def __init__(self) -> None:
        super().__init__("stdout was closed by its reader")
        self.problems = ()


class MessageStream:
    """A text stream that never fails: after the first write error, everything is dropped."""

    def __init__(self, stream: "TextIO") -> None:
        self._stream = stream
        self._off = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, unless the reader is gone."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write lines, unless the reader is gone."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream, unless the reader is gone."""
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        if self._off:
            return
        try:
            act()
        except BlockingIOError:
            pass  # somebody made the terminal non-blocking, and it is slow
        except OSError:
            self._turn_off()
        except RuntimeError:
            pass  # a signal arrived during a write, and its handler writes too

    def _turn_off(self) -> None:
        self._off = True
        # Buffered text would fail again when Python exits, and turn the exit code into 120.
        with suppress(OSError, ValueError):
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, self._stream.fileno())
            os.close(sink)


class DataStream(MessageStream):
    """A text stream whose write errors become our errors: `ReaderGone` for a closed pipe, else a DiffSynthError."""

    _failure: DiffSynthError | None = None

    def _try(self, act: Callable[[], object]) -> None:
        if self._failure:  # typer probes a stream before it prints, and ignores what that raises
            raise self._failure
        try:
            act()
        except OSError as error:
            self._failure = ReaderGone() if error.errno == errno.EPIPE else _cannot_write(error)
            self._turn_off()
            raise self._failure from error


def _cannot_write(error: OSError) -> DiffSynthError:
    what = f"cannot write to stdout: {error.strerror or error}"
    return DiffSynthError(what, "free some space, or redirect the output elsewhere")


@contextmanager
def guarded_streams() -> Iterator[None]:
    """While the block runs, make stdout and stderr fail as described in this module."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):  # a terminal in another encoding, which lacks some characters
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = DataStream(before[0]) if before[0] else before[0]
    sys.stderr = MessageStream(before[1]) if before[1] else before[1]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextmanager
def stdout_as_messages() -> Iterator[None]:
    """While the block runs, make stdout drop what it cannot write, as stderr does: a run is worth more than its
    messages."""
    before = sys.stdout
    stream = before._stream if isinstance(before, DataStream) else before
    sys.stdout = MessageStream(stream) if stream else stream
    try:
        yield
    finally:
        sys.stdout = before


def open_closed_descriptors() -> None:
    """Open the null device for closed stdin, stdout or stderr (`2>&-`). Otherwise the next files opened, weights among
    them, would get their descriptors, and output of libraries would be written into them."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # returns the lowest free descriptor

"""What was found out of files by reading them whole, remembered beside the cache."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from diffsynth_core.json_files import WrongType, as_type, read_json_lines
from diffsynth_core.locks import locked

T = TypeVar("T")
Stamp = list[int]
"""Size in bytes, modification and status-change time in nanoseconds: another stamp means another content."""

MAX_CACHE_BYTES = 2**30
"""Bytes of a memory that is read: some 3 million answers."""


@dataclass(frozen=True)
class _Line:
    """One line of the file."""

    path: str
    question: str
    stamp: Stamp
    answer: Any


class FileCache:
    """Answers to questions about files, by path, stamp and question, in one append-only file.

    Each line is written by one call, so that several processes can share the file; a line that a crash cut short is
    passed over. Threads may ask and tell at the same time. Where nothing can be written, nothing is remembered: all
    that costs is the work again.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: dict[tuple[str, str], tuple[Stamp, Any]] = {}
        self._changing = Lock()
        self._start = ""
        self._read()

    def answer(self, path: Path, question: str, kind: type[T], stamp: Stamp | None = None) -> T | None:
        """What is remembered of a file that has not changed since, as `kind`; None when nothing is, or something else.

        Reads no content.
        """
        known = self._known.get((_absolute(path), question))
        if known is None or known[0] != (stamp or file_stamp(path)):
            return None
        try:
            return as_type(known[1], kind)
        except WrongType:
            return None

    def remember(self, path: Path, question: str, stamp: Stamp, answer: Any) -> None:
        """Keep the answer to a question about a file, as JSON; `stamp` is that of before it was read."""
        name = _absolute(path)
        line = json.dumps({"path": name, "question": question, "stamp": stamp, "answer": answer}) + "\n"
        with self._changing:
            self._known[name, question] = (stamp, answer)
            with suppress(OSError):
                self._memory.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self._memory, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                try:
                    os.write(descriptor, (self._start + line).encode())
                finally:
                    os.close(descriptor)
            self._start = ""

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Within it no other process asks: of those that begin together one reads, the others find its answers."""
        with locked(self._memory.with_suffix(".lock")):
            self._read()
            yield

    def _read(self) -> None:
        self._start = "" if self._ends_with_a_line() else "\n"
        for value in read_json_lines(self._memory, MAX_CACHE_BYTES):
            with suppress(WrongType):
                line = as_type(value, _Line)
                self._known[line.path, line.question] = (line.stamp, line.answer)

    def _ends_with_a_line(self) -> bool:
        """Whether a new line can begin at the end of the file: a crash may have cut the last one short."""
        try:
            with self._memory.open("rb") as stream:
                stream.seek(-1, os.SEEK_END)
                return stream.read(1) == b"\n"
        except OSError:  # missing or empty
            return True


def file_stamp(path: Path) -> Stamp:
    """The stamp of a file as it is now."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _absolute(path: Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links and ask the disk for every part

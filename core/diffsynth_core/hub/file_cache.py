"""Results of reading files in full, cached on disk."""

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
"""Size in bytes, modification and status-change time in nanoseconds: a file with the same stamp is unchanged."""

MAX_CACHE_BYTES = 2**30
"""Maximum size of a cache file that is read: about 3 million entries."""


@dataclass(frozen=True)
class _Entry:
    """One line of the cache file."""

    path: str
    question: str
    stamp: Stamp
    answer: Any


class FileCache:
    """Results about files, by path, stamp and kind of result (`question`), in one append-only file.

    Each line is appended with a single `write` call, so that several processes can share the file; a line that a crash
    truncated is skipped. Thread-safe. If the cache file is not writable, results are kept in memory only, at the cost
    of computing them again in the next process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[tuple[str, str], tuple[Stamp, Any]] = {}
        self._changing = Lock()
        self._start = ""
        self._read()

    def get(self, path: Path, question: str, kind: type[T], stamp: Stamp | None = None) -> T | None:
        """Return the cached result as `kind`; None if there is none, it has another type, or the file has changed.

        Does not read the file.
        """
        known = self._known.get((_absolute(path), question))
        if known is None or known[0] != (stamp or file_stamp(path)):
            return None
        try:
            return as_type(known[1], kind)
        except WrongType:
            return None

    def put(self, path: Path, question: str, stamp: Stamp, answer: Any) -> None:
        """Store a result as JSON; `stamp` is that from before the file was read."""
        name = _absolute(path)
        line = json.dumps({"path": name, "question": question, "stamp": stamp, "answer": answer}) + "\n"
        with self._changing:
            self._known[name, question] = (stamp, answer)
            with suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                try:
                    os.write(descriptor, (self._start + line).encode())
                finally:
                    os.close(descriptor)
            self._start = ""

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other processes from computing results within the block, and reload the cache at its start.

        Of several processes that start together, one reads the files and the others find its results.
        """
        with locked(self._path.with_suffix(".lock")):
            self._read()
            yield

    def _read(self) -> None:
        self._start = "" if self._ends_with_a_line() else "\n"
        for value in read_json_lines(self._path, MAX_CACHE_BYTES):
            with suppress(WrongType):
                line = as_type(value, _Entry)
                self._known[line.path, line.question] = (line.stamp, line.answer)

    def _ends_with_a_line(self) -> bool:
        """Return whether the file ends with a newline: a crash may have truncated the last line."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(-1, os.SEEK_END)
                return stream.read(1) == b"\n"
        except OSError:  # the file is missing or empty
            return True


def file_stamp(path: Path) -> Stamp:
    """Return the current stamp of a file."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _absolute(path: Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links and access the disk for every part

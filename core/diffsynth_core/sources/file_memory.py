"""What was found out of files by reading them whole, remembered beside the cache."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

from diffsynth_core.locks import locked

Stamp = list[int]
"""Size in bytes, modification and status-change time in nanoseconds: another stamp means another content."""


class FileMemory:
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

    def answer(self, path: Path, question: str, stamp: Stamp | None = None) -> Any:
        """What is remembered of a file that has not changed since; None when nothing is. Reads no content."""
        known = self._known.get((_absolute(path), question))
        return known[1] if known and known[0] == (stamp or file_stamp(path)) else None

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
    def alone(self) -> Iterator[None]:
        """Within it no other process asks: of those that begin together one reads, the others find its answers."""
        with locked(self._memory.with_suffix(".lock")):
            self._read()
            yield

    def _read(self) -> None:
        if not self._memory.exists():
            return
        text = self._memory.read_text(encoding="utf-8", errors="replace")
        self._start = "\n" if text and not text.endswith("\n") else ""
        for line in text.splitlines():
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                self._known[entry["path"], entry["question"]] = (entry["stamp"], entry["answer"])


def file_stamp(path: Path) -> Stamp:
    """The stamp of a file as it is now."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _absolute(path: Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links and ask the disk for every part

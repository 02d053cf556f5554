"""What identifies a file: the sha256 of its bytes, computed once and remembered."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from diffsynth_core.files import locked
from diffsynth_core.progress import Reporter

HASHING_THREADS = 8
"""hashlib lets other threads run while it hashes, and a fast disk feeds several."""


class FileIdentities:
    """sha256 of files, remembered by path, size and times in one append-only file.

    Each line is written by one call, so that several processes can share the file; a line that a crash cut short is
    passed over. A changed size, modification or status-change time makes the file be read again.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: dict[str, tuple[list[int], str]] = {}
        self._start = ""
        self._read()

    def _read(self) -> None:
        if not self._memory.exists():
            return
        text = self._memory.read_text(encoding="utf-8")
        self._start = "\n" if text and not text.endswith("\n") else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self._known[entry["path"]] = (entry["stamp"], entry["sha256"])
            except (ValueError, KeyError, TypeError):
                continue

    def known(self, path: Path) -> str | None:
        """The sha256 of `path` when it is remembered and the file is unchanged; reads no content."""
        remembered = self._known.get(absolute(path))
        return remembered[1] if remembered and remembered[0] == file_stamp(path) else None

    def sha256(self, path: Path) -> str:
        """The sha256 of `path` in hex, read only when it is not known."""
        known = self.known(path)
        if known:
            return known
        stamp = file_stamp(path)
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        self._remember(absolute(path), stamp, digest)
        return digest

    def read_all(self, paths: Iterable[Path], reporter: Reporter, label: str) -> None:
        """Make all of `paths` known, showing progress in files when any must be read.

        Of several processes that begin together one reads, and the others find what it remembered.
        """
        unknown = [path for path in dict.fromkeys(paths) if self.known(path) is None]
        if not unknown:
            return
        with locked(self._memory.with_suffix(".lock")):
            self._read()
            unknown = [path for path in unknown if self.known(path) is None]
            with reporter.task(label, len(unknown), "files") as task, ThreadPoolExecutor(HASHING_THREADS) as pool:
                for _ in pool.map(self.sha256, unknown):
                    task.advance()

    def _remember(self, path: str, stamp: list[int], digest: str) -> None:
        self._known[path] = (stamp, digest)
        line = self._start + json.dumps({"path": path, "stamp": stamp, "sha256": digest}) + "\n"
        self._start = ""
        append(self._memory, line)


def append(memory: Path, line: str) -> None:
    """Add a line to a file by one call, or do nothing where it cannot be written: all it costs is the work again."""
    with suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(memory, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def absolute(path: Path) -> str:
    """The path a file is remembered by."""
    return os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links and ask the disk for every part


def file_stamp(path: Path) -> list[int]:
    """Size in bytes, modification and status-change time in nanoseconds: another stamp means another content."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]

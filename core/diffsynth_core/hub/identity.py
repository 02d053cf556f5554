"""What identifies a file: the sha256 of its bytes, computed once and remembered."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from diffsynth_core.hub.file_cache import FileCache, file_stamp
from diffsynth_core.progress import Reporter

HASHING_THREADS = 8
"""hashlib lets other threads run while it hashes, and a fast disk feeds several."""
SHA256 = "sha256"
IDENTITIES = "identities.jsonl"
"""The file below the cache folder in which hashes are remembered."""


class HashCache:
    """sha256 of files; a changed size, modification or status-change time makes the file be read again."""

    def __init__(self, memory: Path) -> None:
        self._memory = FileCache(memory)

    def known(self, path: Path) -> str | None:
        """The sha256 of `path` when it is remembered and the file is unchanged; reads no content."""
        return self._memory.answer(path, SHA256, str)

    def sha256(self, path: Path) -> str:
        """The sha256 of `path` in hex, read only when it is not known."""
        known = self.known(path)
        if known:
            return known
        stamp = file_stamp(path)
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        self._memory.remember(path, SHA256, stamp, digest)
        return digest

    def tell(self, path: Path, digest: str) -> None:
        """Keep the sha256 of a file that was computed while it was written."""
        self._memory.remember(path, SHA256, file_stamp(path), digest)

    def read_all(self, paths: Iterable[Path], reporter: Reporter, label: str) -> None:
        """Make all of `paths` known, showing progress in files when any must be read."""
        unknown = [path for path in dict.fromkeys(paths) if self.known(path) is None]
        if not unknown:
            return
        with self._memory.exclusive():
            unknown = [path for path in unknown if self.known(path) is None]
            with reporter.task(label, len(unknown), "files") as task, ThreadPoolExecutor(HASHING_THREADS) as pool:
                for _ in pool.map(self.sha256, unknown):
                    task.advance()

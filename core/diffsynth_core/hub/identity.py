"""Identity of a file: the sha256 of its bytes, computed once and cached."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from diffsynth_core.hub.file_cache import FileCache, file_stamp
from diffsynth_core.progress import Reporter

HASHING_THREADS = 8
"""hashlib releases the GIL while it hashes, and a fast disk serves several threads."""
SHA256 = "sha256"
"""Kind of result in the file cache."""
IDENTITIES = "identities.jsonl"
"""File in the cache folder with the hashes."""


class HashCache:
    """Cache of the sha256 of files.

    A file is hashed again if its size, modification time or status-change time differs.
    """

    def __init__(self, path: Path) -> None:
        self._cache = FileCache(path)

    def known(self, path: Path) -> str | None:
        """Return the cached sha256 of `path` in hex; None if it is unknown or the file has changed. Does not read the
        file.
        """
        return self._cache.get(path, SHA256, str)

    def sha256(self, path: Path) -> str:
        """Return the sha256 of `path` in hex, reading the file if it is not cached."""
        known = self.known(path)
        if known:
            return known
        stamp = file_stamp(path)
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        self._cache.put(path, SHA256, stamp, digest)
        return digest

    def store(self, path: Path, digest: str) -> None:
        """Store the sha256 of a file that was computed while it was written."""
        self._cache.put(path, SHA256, file_stamp(path), digest)

    def read_all(self, paths: Iterable[Path], reporter: Reporter, label: str) -> None:
        """Hash all of `paths` that are not cached, showing progress in files."""
        unknown = [path for path in dict.fromkeys(paths) if self.known(path) is None]
        if not unknown:
            return
        with self._cache.exclusive():
            unknown = [path for path in unknown if self.known(path) is None]
            with reporter.task(label, len(unknown), "files") as task, ThreadPoolExecutor(HASHING_THREADS) as pool:
                for _ in pool.map(self.sha256, unknown):
                    task.advance()

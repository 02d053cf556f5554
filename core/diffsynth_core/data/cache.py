"""The encoding cache: outputs of frozen encoders on disk, addressed by content.

An entry is one safetensors file named by the sha256 of everything that its content depends on; its metadata contain
the sha256 of its content. Entries are written atomically, never modified, and shared between runs and processes.
"""

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.files import atomic_write, sync_file, sync_folder, temporary_sibling
from diffsynth_core.hub.file_cache import FileCache, file_stamp
from diffsynth_core.weights.headers import Header, make_header, parse_header

if TYPE_CHECKING:
    import torch

CONTENT_HASH = "sha256"
"""Metadata key of an entry with the sha256 of its content."""
WRITING_THREADS = 8
"""Entries that are written at once: a disk syncs several files in about the time of one."""
WHOLE = "whole"
"""Kind of the cached result of verifying an entry."""


def encoding_key(**parts: Any) -> str:
    """Return the name of an entry: sha256 of the parts that its content depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def check_entry(path: Path) -> None:
    """Verify an entry. One of a version without hashes is only checked for truncation.

    Raises:
        DiffSynthError: if it is missing, truncated, or modified.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DiffSynthError(f"cannot read `{path}`: {error.strerror}") from error
    check_content(path, content)


def check_content(path: Path, content: bytes) -> None:
    """Verify the bytes of an entry, as `check_entry` does.

    Raises:
        DiffSynthError: if they are truncated or modified.
    """
    header = parse_header(path, content)
    if header.metadata and header.metadata.get(CONTENT_HASH) != _content_hash(path, content, header):
        raise DiffSynthError(f"`{path}`: checksum mismatch")


def _content_hash(path: Path, content: bytes, header: Header) -> str:
    """Return the sha256 of the entry's name and of the file as it would be without metadata.

    The name is included because another entry's content under this name is damage too.
    """
    described = ((name, tensor.dtype, tensor.shape) for name, tensor in header.tensors.items())
    digest = hashlib.sha256(path.stem.encode() + make_header(described, {}))
    digest.update(memoryview(content)[8 + int.from_bytes(content[:8], "little") :])
    return digest.hexdigest()


class EncodingCache:
    """Entries below one folder, for one family and encoder.

    Args:
        behind: another cache whose entries count as those of this one; `fetch` copies them here.
        memory: cache of which entries were verified; without it each entry is verified whenever it is requested.
    """

    def __init__(self, folder: Path, behind: "EncodingCache | None" = None, memory: FileCache | None = None) -> None:
        self.folder, self._behind, self._memory = folder, behind, memory

    def __getstate__(self) -> dict[str, Any]:
        """Omit the file cache, which cannot be passed to another process: data workers only read."""
        return {**self.__dict__, "_memory": None}

    def path(self, key: str) -> Path:
        """Return the file of an entry."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Return whether the entry exists and is intact; one that a disk error changed is encoded again."""
        return self._is_whole(key) or (self._behind is not None and self._behind.has(key))

    def is_damaged(self, key: str) -> bool:
        """Return whether an entry exists although `has` is False."""
        return self.path(key).exists() or (self._behind is not None and self._behind.is_damaged(key))

    def is_known(self, key: str) -> bool:
        """Return whether the result of `has` is cached, so that the entry need not be read."""
        return self._is_remembered(key) or (self._behind is not None and self._behind.is_known(key))

    def _is_remembered(self, key: str) -> bool:
        try:
            return bool(self._memory and self._memory.get(self.path(key), WHOLE, bool))
        except OSError:
            return False

    def _is_whole(self, key: str) -> bool:
        if self._is_remembered(key):
            return True
        path = self.path(key)
        try:
            stamp = file_stamp(path)
            check_entry(path)
        except (DiffSynthError, OSError):
            return False
        if self._memory:
            self._memory.put(path, WHOLE, stamp, True)
        return True

    def fetch(self, key: str) -> None:
        """Copy an entry here that only the other cache has: as a hard link if the disk supports it.

        Raises:
            DiffSynthError: if the entry is gone, or the disk refuses.
        """
        if self._behind is None or self._is_whole(key):
            return
        source = self._behind.path(key)
        with atomic_write(self.path(key)) as temporary:
            try:
                temporary.hardlink_to(source)
            except OSError:  # another disk, or one without links
                shutil.copyfile(source, temporary)

    def write(self, key: str, encoded: Mapping[str, "torch.Tensor"]) -> None:
        """Store the output of an encoder for one sample.

        A power failure may lose the entry until `sync_folder` of its folder: a sync for each takes longer than it is
        worth, since a lost entry is encoded again.
        """
        from diffsynth_core.weights.writing import safetensors_bytes

        path = self.path(key)
        header, *values = safetensors_bytes(encoded, {})
        digest = hashlib.sha256(key.encode() + header)
        for value in values:
            digest.update(value)
        header = next(safetensors_bytes(encoded, {CONTENT_HASH: digest.hexdigest()}))
        with temporary_sibling(path) as temporary:
            with temporary.open("wb") as stream:
                stream.writelines((header, *values))
            sync_file(temporary)
            temporary.replace(path)
        if self._memory:
            self._memory.put(path, WHOLE, file_stamp(path), True)

    def read(self, key: str) -> dict[str, "torch.Tensor"]:
        """Return an entry's tensors, on the CPU. A damaged entry is removed, so that the next run encodes it again.

        Raises:
            DiffSynthError: if the entry is gone or damaged.
        """
        from safetensors import SafetensorError

        path = self.path(key)
        try:
            return _load(path)
        except (DiffSynthError, SafetensorError) as error:
            with suppress(OSError):
                path.unlink()
            what = error.problems[0].message if isinstance(error, DiffSynthError) else str(error)
            raise DiffSynthError(
                f"the cached encoding {what}", "continue with `--resume auto` to encode it again"
            ) from error
        except OSError as error:
            raise DiffSynthError(
                f"cannot read the cached encoding `{path}`: {error.strerror}",
                "continue with `--resume auto` to encode it again if it is missing",
            ) from error

    def find(self, key: str) -> "dict[str, torch.Tensor] | None":
        """Return an entry's tensors, on the CPU; None if it is missing or damaged."""
        from safetensors import SafetensorError

        try:
            return _load(self.path(key))
        except (DiffSynthError, SafetensorError, OSError):
            return None


def _load(path: Path) -> "dict[str, torch.Tensor]":
    """Return the tensors of an intact entry, on the CPU.

    Raises:
        DiffSynthError, SafetensorError: if it is damaged.
        OSError: if it cannot be read.
    """
    from safetensors.torch import load

    content = path.read_bytes()
    check_content(path, content)
    tensors: dict[str, torch.Tensor] = load(content)
    return tensors


class CacheWriter:
    """Checks and writes entries in threads: who makes them waits neither for the device nor for the disk.

    Leaving the block waits for all, and raises what went wrong with one; then no power failure takes them.
    """

    def __init__(self, cache: EncodingCache) -> None:
        self._cache, self._pool = cache, ThreadPoolExecutor(WRITING_THREADS)
        self._writes: deque[Future[None]] = deque()
        self._folders: set[Path] = set()

    def write(self, key: str, tensors: "Mapping[str, torch.Tensor]", check: Callable[[], None] = lambda: None) -> None:
        """Write an entry that passes a check, after one of those before it if there are many.

        Raises:
            DiffSynthError: if one of those before it does not pass, or cannot be written.
        """
        if len(self._writes) == WRITING_THREADS:
            self._writes.popleft().result()
        self._folders.add(self._cache.path(key).parent)
        self._writes.append(self._pool.submit(self._write, key, tensors, check))

    def wait(self) -> None:
        """Wait for all entries so far.

        Raises:
            DiffSynthError: if one of them does not pass, or cannot be written.
        """
        while self._writes:
            self._writes.popleft().result()

    def _write(self, key: str, tensors: "Mapping[str, torch.Tensor]", check: Callable[[], None]) -> None:
        check()
        self._cache.write(key, {name: tensor.cpu() for name, tensor in tensors.items()})

    def close(self, wait: bool = True) -> None:
        """End the threads once they have written what they are writing; `wait`: and have made sure of all entries.

        Raises:
            DiffSynthError: if one of the entries does not pass, or cannot be written.
        """
        with self._pool:
            if wait:
                self.wait()
                list(self._pool.map(sync_folder, self._folders))

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.close(wait=error is None)

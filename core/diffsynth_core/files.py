"""Folders used by diffsynth, and atomic file writes: an interruption never leaves a partial file under a final name."""

import json
import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from diffsynth_core.cache_folder import cache_folder
from diffsynth_core.errors import STOPPING_SIGNALS, DiffSynthError


def default_cache_path() -> Path:
    """Return the path of `cache_folder`.

    Raises:
        DiffSynthError: if the user has no home folder.
    """
    folder = cache_folder()
    if folder is None:
        raise DiffSynthError("there is no home folder for the cache", "set XDG_CACHE_HOME or pass `--cache_path`")
    return folder


def model_base_path() -> Path:
    """Return the folder of downloaded models: `$DIFFSYNTH_MODEL_BASE_PATH`, or `./models`."""
    return Path(os.environ.get("DIFFSYNTH_MODEL_BASE_PATH") or "models")


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(_nearest_folder(folder)).free


def disk_id(folder: Path) -> int:
    """Return the device number of the disk of a folder, which need not exist yet."""
    return _nearest_folder(folder).stat().st_dev


def _nearest_folder(folder: Path) -> Path:
    """Return the folder, or its nearest existing parent."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
"""Suffixes of safetensors files."""
PICKLED_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
"""Suffixes of files that PyTorch pickled."""
GGUF_SUFFIX = ".gguf"
"""Suffix of GGUF files."""
TEMPORARY_SUFFIX = ".tmp"
"""Suffix of files that are still being written."""
_SHARD_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.\w+)$")


def stem_of_shard(name: str) -> str | None:
    """Return `"model"` for `"model-00001-of-00003.safetensors"`, and None for a name that is not that of a shard."""
    match = _SHARD_NAME.match(name)
    return match["stem"] if match else None


def missing_shards(names: Iterable[str]) -> list[str]:
    """Return the shards that the numbers in `names` imply but that are not in `names`."""
    present = dict.fromkeys(names)
    promised = [
        f"{match['stem']}-{number:05d}-of-{match['count']}{match['ending']}"
        for match in map(_SHARD_NAME.match, present)
        if match
        for number in range(1, int(match["count"]) + 1)
    ]
    return [name for name in dict.fromkeys(promised) if name not in present]


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and rename it to `path` if the block succeeds.

    The file is fsynced before the rename and the folder after it, so that `path` only ever refers to a complete file,
    even after a power failure.

    Raises:
        DiffSynthError: if the disk refuses; an existing `path` is unchanged then.
    """
    with temporary_sibling(path) as temporary:
        yield temporary
        move_into_place(temporary, path)


@contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; a file that is still there at the end of the block is deleted.

    The name contains the process id, so that `remove_stale_files` recognizes abandoned files.

    Raises:
        DiffSynthError: if the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        raise DiffSynthError(
            f"cannot write `{path}`: {error.strerror or error}", "free some space or choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a finished temporary file to its final name, and make both its bytes and its name durable."""
    sync_file(temporary)
    temporary.replace(path)
    sync_folder(path.parent)


def remove_stale_files(path: Path) -> None:
    """Delete temporary files of `path` that killed processes left next to it."""
    for leftover in path.parent.glob(f".{escape(path.name)}.*{TEMPORARY_SUFFIX}"):
        number = leftover.name.removeprefix(f".{path.name}.").partition("-")[0]
        if number.isdigit() and not _is_alive(int(number)):
            leftover.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # the process exists, but belongs to another user
        return True
    return True


@contextmanager
def created_folder(folder: Path) -> Iterator[None]:
    """Create `folder` for the block. If the block fails, remove the folders that were created, as long as they are
    empty.

    Raises:
        DiffSynthError: if the disk refuses.
    """
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    try:
        for created in reversed(missing):
            created.mkdir(exist_ok=True)
        yield
    except OSError as error:
        _remove_empty(missing)
        raise DiffSynthError(
            f"cannot write to `{folder}`: {error.strerror or error}", "choose another folder"
        ) from error
    except BaseException:
        _remove_empty(missing)
        raise


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def ignore_signals() -> Iterator[None]:
    """Ignore stop signals within the block.

    For short sections only, such as several renames that belong together: a signal that arrives meanwhile is lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPPING_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def sync_file(path: Path) -> None:
    """Flush the bytes of a file to disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk: without it a rename can be lost in a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LineFile:
    """An append-only text file; each line has reached the operating system when `write` returns."""

    def __init__(self, path: Path) -> None:
        """Open the file, or create it.

        Raises:
            OSError: if it can be neither opened nor created.
        """
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, line: str) -> None:
        """Append a line, or nothing of it if the disk refuses.

        Raises:
            OSError: if the disk refuses.
        """
        size = os.fstat(self._descriptor).st_size
        data = f"{line}\n".encode("utf-8", "backslashreplace")
        try:
            while data:  # a nearly full disk accepts a part before it refuses
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, size)
            raise

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            os.close(self._descriptor)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically.

    Bytes of a file name that are not UTF-8 (lone surrogates in Python) are written as escapes such as `\\udcff`, which
    a JSON parser reads back unchanged.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def make_numbered_folder(parent: Path, name: Callable[[int], str]) -> Path:
    """Create and return the first of `parent/name(1)`, `parent/name(2)` … that does not exist yet."""
    number = 1
    while True:
        folder = parent / name(number)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise DiffSynthError(
                f"cannot create `{folder}`: {error.strerror}", "move or delete what is in the way"
            ) from error
        else:
            return folder

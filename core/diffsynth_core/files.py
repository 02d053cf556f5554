"""Folders of the tool, and writing files so that a stop at any moment leaves no half file under a final name."""

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

from diffsynth_core.errors import STOPPING_SIGNALS, DiffSynthError


def default_cache_path() -> Path:
    """`$XDG_CACHE_HOME/diffsynth`, else `~/.cache/diffsynth`.

    Raises:
        DiffSynthError: when the user has no home folder.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "diffsynth"
    except RuntimeError as error:
        raise DiffSynthError(
            "there is no home folder for the cache", "set XDG_CACHE_HOME or pass `--cache_path`"
        ) from error


def model_base_path() -> Path:
    """Folder of downloaded models: `$DIFFSYNTH_MODEL_BASE_PATH`, else `./models`."""
    return Path(os.environ.get("DIFFSYNTH_MODEL_BASE_PATH") or "models")


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that a folder is on, or will be."""
    return shutil.disk_usage(_nearest_folder(folder)).free


def disk_id(folder: Path) -> int:
    """What tells the disk that a folder is on, or will be, from others."""
    return _nearest_folder(folder).stat().st_dev


def _nearest_folder(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
PICKLED_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
GGUF_SUFFIX = ".gguf"
"""Endings of weight files, by format."""
TEMPORARY_SUFFIX = ".tmp"
_SHARD_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.\w+)$")


def stem_of_shard(name: str) -> str | None:
    """`"model"` for `"model-00001-of-00003.safetensors"`; None for a name that promises no other shards."""
    match = _SHARD_NAME.match(name)
    return match["stem"] if match else None


def missing_shards(names: Iterable[str]) -> list[str]:
    """The shards that the names of others promise and that are not among `names`."""
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
    """A temporary name beside `path`, which takes its place when the block ends well.

    The file is fsynced before it is renamed and the folder after, so that the final name only ever shows a whole file.

    Raises:
        DiffSynthError: when the disk refuses; nothing is left under either name.
    """
    with temporary_sibling(path) as temporary:
        yield temporary
        move_into_place(temporary, path)


@contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; what still stands under it when the block ends is deleted.

    Raises:
        DiffSynthError: when the disk refuses.
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
    """Give a finished file its final name, durably."""
    sync_file(temporary)
    temporary.replace(path)
    sync_folder(path.parent)


def remove_stale_files(path: Path) -> None:
    """Delete what processes that were killed while they wrote `path` left beside it."""
    for leftover in path.parent.glob(f".{escape(path.name)}.*{TEMPORARY_SUFFIX}"):
        number = leftover.name.removeprefix(f".{path.name}.").partition("-")[0]
        if number.isdigit() and not _is_alive(int(number)):
            leftover.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


@contextmanager
def created_folder(folder: Path) -> Iterator[None]:
    """Within it `folder` is there; one that was made for the block goes again, with its parents, if the block fails."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    try:
        for place in reversed(missing):
            place.mkdir(exist_ok=True)
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
    for place in folders:
        with suppress(OSError):
            place.rmdir()


@contextmanager
def ignore_signals() -> Iterator[None]:
    """Within it signals that ask to stop have no effect: for moments alone, such as several renames that belong
    together."""
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
    """Make the bytes of a file durable."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LineFile:
    """A text file that lines are appended to, each whole and on its way to the disk when `write` returns."""

    def __init__(self, path: Path) -> None:
        """Raises: OSError: when it cannot be opened or made."""
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, line: str) -> None:
        """Append a line; where the disk refuses, nothing of it stays.

        Raises:
            OSError: when the disk refuses.
        """
        size = os.fstat(self._descriptor).st_size
        data = f"{line}\n".encode("utf-8", "backslashreplace")
        try:
            while data:  # a disk that is nearly full takes a part before it refuses
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, size)
            raise

    def close(self) -> None:
        with suppress(OSError):
            os.close(self._descriptor)


def write_text(path: Path, text: str) -> None:
    """Put `text` (UTF-8) at `path`, whole or not at all.

    Bytes of a file name that are not UTF-8, which Python keeps as halves of characters, become escapes such as
    `\\udcff`: in JSON they are read back as they were.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Put `value` at `path` as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def make_numbered_folder(parent: Path, name: Callable[[int], str]) -> Path:
    """Make and return the first of `parent/name(1)`, `parent/name(2)` … that does not exist yet."""
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

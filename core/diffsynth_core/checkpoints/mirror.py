"""A copy of a run's folder in another place, which is brought up to date while the run goes on. No torch.

The place is a folder or a URL of any file system that fsspec knows. A file appears there whole: it is written under a
temporary name, then moved. `.mirror.json`, the list of what the mirror has written, says which run the copy is of, and
what may be deleted there: nothing that is not listed ever is.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from diffsynth_core.checkpoints.run_folder import (
    CHECKPOINT_NAMES,
    CSV_FILE,
    LOG,
    METRICS,
    PAGE,
    PREVIEWS,
    RECORD,
    TENSORBOARD,
    VALIDATIONS,
)
from diffsynth_core.checkpoints.saved_states import LOOP_STATE, OPTIMIZER, STATE_FOLDER, TRAINED, state_folders
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.json_files import InvalidJson, WrongType, as_type, parse_json

LIST = ".mirror.json"
"""Name of the list at the mirror."""
PARTIAL = ".mirror.tmp"
"""Name at the mirror under which a file is written before it is moved to its own; one at a time is."""
SMALL_FILES = (METRICS, VALIDATIONS, LOG, CSV_FILE, PAGE, f"{PREVIEWS}/*/*", f"{TENSORBOARD}/**/*")
"""Patterns of the files that are copied besides checkpoints, states and `run.json`."""
DELETED_BY_RUN = (".safetensors", LOOP_STATE)
"""Endings of files that a run deletes while it goes on: checkpoints and states."""
CHUNK_BYTES = 2**24
"""How much of a file is read at a time."""
TOP = PurePosixPath(".")
"""The folder of the run, as the parent of a path below it."""

Stamp = tuple[int, int]
"""Size in bytes and modification time in nanoseconds of a file when it was copied."""


@dataclass(frozen=True)
class Mirrored:
    """The list at a mirror.

    Attributes:
        run: the `id` of the run that it is a copy of.
        files: path below the run's folder -> stamp; None if copying it has begun and perhaps not ended.
    """

    run: str
    files: Mapping[str, Stamp | None]


class OfAnotherRun(DiffSynthError):
    """The place of a mirror is not free: it holds the copy of another run, or files that no mirror wrote."""


class Mirror:
    """The mirror of one run. Methods raise what its file system raises, besides `OfAnotherRun`."""

    def __init__(self, address: str) -> None:
        """`address`: a folder or a URL."""
        self.address = address
        self._written: dict[str, Stamp | None] | None = None
        """What is there, as in the list; None before it was read."""

    def check(self, run: str | None) -> None:
        """Check that the run may be copied here, and that files can be written and deleted.

        Args:
            run: the `id` of the run; None for one that has not started.

        Raises:
            OfAnotherRun: if something else is here.
        """
        system, root = self._open()
        self._read_list(system, root, run)
        created = [str(path) for path in (PurePosixPath(root), *PurePosixPath(root).parents) if not system.exists(path)]
        system.makedirs(root, exist_ok=True)
        system.pipe_file(f"{root}/{PARTIAL}", b"diffsynth")
        system.rm_file(f"{root}/{PARTIAL}")
        for folder in created:
            _remove_empty(system, folder)

    def update(self, folder: Path, run: str) -> int:
        """Bring the copy of a run's folder up to date; return the number of bytes that were copied.

        States and checkpoints are opened before the first byte is copied: the run may delete them meanwhile. A state is
        complete with its `state.json`, so that comes after its tensors; `run.json`, as it was at the beginning, comes
        last, and only then what the run has deleted is deleted here.

        Raises:
            OfAnotherRun: if something else is here.
        """
        record = _read_if_there(folder / RECORD)
        system, root = self._open()
        written = self._read_list(system, root, run) if self._written is None else self._written
        self._written = written
        found = {name: _stamp(folder / name) for name in _files_of_run(folder)}
        changed = [name for name, stamp in found.items() if stamp is None or written.get(name) != stamp]
        gone = [name for name in written if name not in found and name != RECORD]
        written |= {RECORD: None, **dict.fromkeys(changed)}
        self._write_list(system, root, run)
        total = 0
        with ExitStack() as stack:
            held = {name: _opened(stack, folder / name) for name in changed if name.endswith(DELETED_BY_RUN)}
            incomplete = {PurePosixPath(name).parent for name, stream in held.items() if stream is None} - {TOP}
            for name in changed:
                stream = held[name] if name in held else _opened(stack, folder / name)
                if stream and PurePosixPath(name).parent not in incomplete:  # else it has been deleted meanwhile
                    total += self._copy(system, root, name, stream)
                    written[name] = found[name]
        if record is not None:
            total += self._put(system, root, RECORD, record)
        for name in sorted(gone, key=lambda name: not name.endswith(LOOP_STATE)):
            self._delete(system, root, name)
            del written[name]
        self._write_list(system, root, run)
        return total

    def _open(self) -> tuple[AbstractFileSystem, str]:
        system, root = url_to_fs(self.address)
        return system, root.rstrip("/")

    def _read_list(self, system: AbstractFileSystem, root: str, run: str | None) -> dict[str, Stamp | None]:
        """Return what the mirror of this run has written here."""
        system.invalidate_cache()
        try:
            text = system.cat_file(f"{root}/{LIST}").decode()
        except FileNotFoundError:
            there = [name for name in _names_in(system, root) if name != PARTIAL]
            if there:
                what = f"the mirror `{self.address}` already holds `{there[0]}`, which no mirror of a run has written"
                raise OfAnotherRun(what, "choose an empty folder") from None
            return {}
        try:
            listed = as_type(parse_json(text), Mirrored)
        except (InvalidJson, WrongType) as error:
            raise OfAnotherRun(
                f"`{LIST}` of the mirror `{self.address}` is damaged", "choose another folder"
            ) from error
        if listed.run != run:
            raise OfAnotherRun(
                f"the mirror `{self.address}` holds another run",
                "choose another folder; or, to continue that run, copy it to `output_path` and pass `--resume auto`",
            )
        return dict(listed.files)

    def _write_list(self, system: AbstractFileSystem, root: str, run: str) -> None:
        system.makedirs(root, exist_ok=True)
        self._put(system, root, LIST, json.dumps(asdict(Mirrored(run, self._written or {}))).encode())

    def _put(self, system: AbstractFileSystem, root: str, name: str, content: bytes) -> int:
        system.pipe_file(f"{root}/{PARTIAL}", content)
        self._move(system, root, name)
        return len(content)

    def _copy(self, system: AbstractFileSystem, root: str, name: str, stream: BinaryIO) -> int:
        """Copy a file, and return the number of its bytes."""
        with system.open(f"{root}/{PARTIAL}", "wb") as target:
            shutil.copyfileobj(stream, target, CHUNK_BYTES)
        size, written = stream.tell(), system.info(f"{root}/{PARTIAL}")["size"]
        if written != size:
            raise OSError(f"`{name}` has {size} bytes, of which {written} arrived")
        self._move(system, root, name)
        return size

    def _move(self, system: AbstractFileSystem, root: str, name: str) -> None:
        system.makedirs(str(PurePosixPath(root, name).parent), exist_ok=True)
        system.mv(f"{root}/{PARTIAL}", f"{root}/{name}")

    def _delete(self, system: AbstractFileSystem, root: str, name: str) -> None:
        with suppress(FileNotFoundError):
            system.rm_file(f"{root}/{name}")
        parent = PurePosixPath(name).parent
        if parent != TOP and not _names_in(system, f"{root}/{parent}"):
            _remove_empty(system, f"{root}/{parent}")


def _files_of_run(folder: Path) -> Iterator[str]:
    """Yield the paths of the files to copy, in that order, `run.json` apart: states last, the latest first."""
    for pattern in (*SMALL_FILES, *CHECKPOINT_NAMES):
        for path in sorted(folder.glob(pattern)):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and not any(part.startswith(".") for part in PurePosixPath(name).parts):
                yield name
    for state in state_folders(folder):
        yield from (f"{STATE_FOLDER}/{state.name}/{name}" for name in (TRAINED, OPTIMIZER, LOOP_STATE))


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def _opened(stack: ExitStack, path: Path) -> BinaryIO | None:
    """Open a file to read until the stack is left; None if it has been deleted."""
    try:
        return stack.enter_context(path.open("rb"))
    except FileNotFoundError:
        return None


def _read_if_there(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _names_in(system: AbstractFileSystem, folder: str) -> Sequence[str]:
    """Return the names in a folder; none if it does not exist."""
    try:
        return [PurePosixPath(path).name for path in system.ls(folder, detail=False)]
    except FileNotFoundError:
        return []


def _remove_empty(system: AbstractFileSystem, folder: str) -> None:
    """Remove an empty folder, where folders are more than parts of names; file systems differ in how they refuse."""
    with suppress(Exception):
        system.rmdir(folder)

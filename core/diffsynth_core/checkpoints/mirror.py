"""A copy of a run's folder in another place, which is brought up to date while the run goes on. No torch.

The place is a folder or a URL of any file system that fsspec knows. A file appears there whole: it is written under a
temporary name, then moved. `.mirror.json`, the list of what the mirror has written, says which run the copy is of, and
what may be deleted there: nothing that is not listed ever is. What is missing in the run's folder is no reason to
delete it here: the mirror is for the day on which that folder is lost.
"""

import ftplib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from errno import EEXIST
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from uuid import uuid4

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
    RunRecord,
)
from diffsynth_core.checkpoints.saved_states import (
    LOOP_STATE,
    OPTIMIZER,
    STATE_FOLDER,
    TRAINED,
    state_folders,
    step_of_state,
)
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.json_files import InvalidJson, WrongType, as_type, parse_json

LIST = ".mirror.json"
"""Name of the list at the mirror."""
PARTIAL = ".mirror.tmp"
"""How the names begin under which files are written at the mirror before they are moved to their own."""
SMALL_FILES = (METRICS, VALIDATIONS, LOG, CSV_FILE, PAGE, f"{PREVIEWS}/*/*", f"{TENSORBOARD}/**/*")
"""Patterns of the files that are copied besides checkpoints, states and `run.json`."""
STATE_FILES = (TRAINED, OPTIMIZER, LOOP_STATE)
"""Files of a state, in the order in which they are copied."""
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
        self._place: _Place | None = None
        """Open from the first update on; after a failed one, the next opens it again."""
        self._written: dict[str, Stamp | None] | None = None
        """What is there, as in the list; None before it was read."""

    def check(self, run: str | None) -> None:
        """Check that the run may be copied here, and that files can be written, replaced and deleted.

        The run itself may be copying meanwhile, by another command.

        Args:
            run: the `id` of the run; None for one that has not started.

        Raises:
            OfAnotherRun: if something else is here.
        """
        name = f"{PARTIAL}.{uuid4().hex}"
        place = _Place.at(self.address, f"{name}.new")
        self._read_list(place, run)
        root = PurePosixPath(place.root)
        created = [str(path) for path in (root, *root.parents) if not place.system.exists(path)]
        for _ in range(2):  # the second replaces the first
            place.put(name, b"diffsynth")
        place.delete(name)
        for folder in created:
            _remove_empty(place.system, folder)

    def update(self, folder: Path, run: str) -> int:
        """Bring the copy of a run's folder up to date; return the number of bytes that were copied.

        What the run may delete meanwhile is opened before the first byte is copied. A state is complete with its
        `state.json`, so that comes after its tensors; `run.json`, as it was at the beginning, comes last, and only then
        what the run no longer needs is deleted (`_superseded`).

        Raises:
            OfAnotherRun: if something else is here.
            FileNotFoundError: if the folder has no `run.json`.
        """
        try:
            return self._update(folder, run)
        except BaseException:
            self._place = None  # its connection may be closed for ever
            raise

    def _update(self, folder: Path, run: str) -> int:
        text = (folder / RECORD).read_bytes()
        record = as_type(parse_json(text.decode()), RunRecord)
        if self._place is None:
            self._place = _Place.at(self.address, f"{PARTIAL}.{run}")
        if self._written is None:
            self._written = self._read_list(self._place, run)
        place, written = self._place, self._written
        found = {name: _stamp(folder / name) for name in _files_of_run(folder)}
        changed = [name for name, stamp in found.items() if stamp is None or written.get(name) != stamp]
        written |= {RECORD: None, **dict.fromkeys(changed)}
        _write_list(place, run, written)
        total = 0
        with ExitStack() as stack:
            deletable = _deleted_by_run(record)
            held = {
                name: _opened(stack, folder / name)
                for name in changed
                if name in deletable or name.startswith(f"{STATE_FOLDER}/")
            }
            incomplete = {PurePosixPath(name).parent for name, stream in held.items() if stream is None} - {TOP}
            for name in changed:
                with ExitStack() as one:
                    stream = held[name] if name in held else _opened(one, folder / name)
                    if stream and PurePosixPath(name).parent not in incomplete:  # else it has been deleted meanwhile
                        total += place.copy(name, stream)
                        written[name] = found[name]
        total += place.put(RECORD, text)
        for name in sorted(_superseded(record, written, found), key=lambda name: not name.endswith(LOOP_STATE)):
            place.delete(name)
            del written[name]
        _write_list(place, run, written)
        return total

    def _read_list(self, place: "_Place", run: str | None) -> dict[str, Stamp | None]:
        """Return what the mirror of this run has written here."""
        place.system.invalidate_cache()
        try:
            text = place.system.cat_file(f"{place.root}/{LIST}").decode()
        except FileNotFoundError:
            there = [name for name in _names_in(place.system, place.root) if not name.startswith(PARTIAL)]
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


@dataclass(frozen=True)
class _Place:
    """An open folder of a file system.

    Attributes:
        partial: name under which a file is written before it is moved to its own; one at a time is.
    """

    system: AbstractFileSystem
    root: str
    partial: str

    @classmethod
    def at(cls, address: str, partial: str) -> "_Place":
        """Open it with a connection of its own: one of fsspec's cache may be closed."""
        system, root = url_to_fs(address, skip_instance_cache=True)
        return cls(system, root.rstrip("/"), partial)

    def put(self, name: str, content: bytes) -> int:
        """Write a file, and return the number of its bytes."""
        self.system.makedirs(self.root, exist_ok=True)
        self.system.pipe_file(f"{self.root}/{self.partial}", content)
        self._move(name)
        return len(content)

    def copy(self, name: str, stream: BinaryIO) -> int:
        """Copy a file, and return the number of its bytes."""
        with self.system.open(f"{self.root}/{self.partial}", "wb") as target:
            shutil.copyfileobj(stream, target, CHUNK_BYTES)
        size, written = stream.tell(), self.system.info(f"{self.root}/{self.partial}")["size"]
        if written != size:
            raise OSError(f"`{name}` has {size} bytes, of which {written} arrived")
        self._move(name)
        return size

    def _move(self, name: str) -> None:
        source, target = f"{self.root}/{self.partial}", f"{self.root}/{name}"
        self.system.makedirs(str(PurePosixPath(target).parent), exist_ok=True)
        try:
            self.system.mv(source, target)
        except (OSError, ftplib.error_perm) as error:  # SMB and some FTP servers rename to no name that is taken
            if isinstance(error, OSError) and error.errno != EEXIST:
                raise
            self.system.rm_file(target)
            self.system.mv(source, target)

    def delete(self, name: str) -> None:
        """Delete a file if it is there, and the folder that is empty without it."""
        with suppress(FileNotFoundError):
            self.system.rm_file(f"{self.root}/{name}")
        parent = PurePosixPath(name).parent
        if parent != TOP and not _names_in(self.system, f"{self.root}/{parent}"):
            _remove_empty(self.system, f"{self.root}/{parent}")


def _write_list(place: _Place, run: str, written: Mapping[str, Stamp | None]) -> None:
    place.put(LIST, json.dumps(asdict(Mirrored(run, written))).encode())


def _deleted_by_run(record: RunRecord) -> set[str]:
    """Return the checkpoints that the run may delete while it goes on: bounded, as only so many files can be open."""
    return _listed_checkpoints(record) if record.parameters.get("keep_checkpoints") else set()


def _listed_checkpoints(record: RunRecord) -> set[str]:
    return {saved.file for entry in record.checkpoints for saved in entry.files}


def _superseded(
    record: RunRecord, written: Mapping[str, Stamp | None], found: Mapping[str, Stamp | None]
) -> Iterator[str]:
    """Yield what the mirror may delete, after all that was found in the run's folder has been copied.

    That is what the run has deleted: checkpoints that `run.json` does not list, and states before the latest one that
    has arrived whole, or of a course that the run has left by resuming before them.
    """
    listed = _listed_checkpoints(record)
    whole = [
        step_of_state(state)
        for state in {PurePosixPath(name).parent for name in found if name.startswith(f"{STATE_FOLDER}/")}
        if all(written[f"{state}/{name}"] for name in STATE_FILES)
    ]
    latest = max(filter(None, whole), default=None)
    for name in written:
        path = PurePosixPath(name)
        if name in found:
            continue
        if path.parent == TOP and any(path.match(pattern) for pattern in CHECKPOINT_NAMES):
            if name not in listed:
                yield name
        elif path.parts[0] == STATE_FOLDER and latest is not None:
            step = step_of_state(path.parent) or 0
            if step < latest or step > record.step:
                yield name


def _files_of_run(folder: Path) -> Iterator[str]:
    """Yield the paths of the files to copy, in that order, `run.json` apart: states last, the latest first."""
    for pattern in (*SMALL_FILES, *CHECKPOINT_NAMES):
        for path in sorted(folder.glob(pattern)):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and not any(part.startswith(".") for part in PurePosixPath(name).parts):
                yield name
    for state in state_folders(folder):
        yield from (f"{STATE_FOLDER}/{state.name}/{name}" for name in STATE_FILES)


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

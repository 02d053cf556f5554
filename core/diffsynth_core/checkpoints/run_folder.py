"""The folder of a run: `run.json`, metrics, log, lock. No torch."""

import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.files import LineFile, write_json, write_text
from diffsynth_core.json_files import InvalidJson, WrongType, as_type, parse_json, read_json
from diffsynth_core.locks import holding, open_lock

RECORD = "run.json"
"""Name of the run record."""
METRICS = "metrics.jsonl"
"""Name of the metrics file."""
VALIDATIONS = "validation.jsonl"
"""Name of the file of losses on held-out samples."""
LOG = "train.log"
"""Name of the copy of the console output."""
PAGE = "report.html"
"""Name of the page of the run."""
PREVIEWS = "samples"
"""Name of the folder of previews; those after step N are in its folder `step-N`."""
PREVIEW_LIST = "images.json"
"""Name of the list of the previews of a step, written last."""
CSV_FILE = "loss.csv"
"""File of the csv tracker, with the name and the columns that it has in DiffSynth-Studio."""
TENSORBOARD = "tensorboard_log"
"""Folder of the TensorBoard tracker."""
LOCK = ".lock"
"""Name of the lock file."""
RECORDED_PACKAGES = ("diffsynth-cli", "torch", "accelerate", "diffusers", "transformers", "peft", "safetensors")
"""Packages whose versions are recorded."""
CHECKPOINT_NAMES = ("epoch-*.safetensors", "step-*.safetensors")
"""Patterns of checkpoint files."""
AVERAGE_SUFFIX = ".ema"
"""What follows the name of a checkpoint in that of the file of its averages (`step-5.ema.safetensors`)."""


@dataclass(frozen=True)
class SavedFile:
    """One file of a checkpoint."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class CheckpointEntry:
    """One saved checkpoint."""

    file: str
    step: int
    epoch: int
    sha256: str
    bytes: int
    validation_loss: float | None = None
    """On the held-out samples, if the run has some and the loss is finite."""
    average: SavedFile | None = None
    """The moving averages of the weights (`ema_decay`)."""

    @property
    def files(self) -> tuple[SavedFile, ...]:
        """The weights, and their averages, if there are some."""
        weights = SavedFile(self.file, self.sha256, self.bytes)
        return (weights, self.average) if self.average else (weights,)


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of the main process's GPU: the peak of training as estimated before, and as measured so far."""

    estimated: int
    peak: int


@dataclass
class RunRecord:
    """`run.json`: what a run is, and how far it got.

    status: running | completed | interrupted | failed.
    """

    parameters: dict[str, Any]
    family: str
    seed: int
    dataset_fingerprint: str
    components: dict[str, dict[str, str]]
    """Component -> file -> sha256."""
    mixed_precision: str
    micro_batches_per_step: int
    """Over all processes: gradient accumulation times processes."""
    id: str = ""
    """Identifies the run in its states; empty in records of versions without it."""
    float8_components: list[str] = field(default_factory=list)
    """Components whose weights are stored in 8-bit floats, sorted."""
    quantized_components: dict[str, str] = field(default_factory=dict)
    """Component that is quantized otherwise -> its storage (`find_store`)."""
    fused_optimizer: bool = False
    """Whether the step of the optimizer is a fused kernel."""
    status: str = "running"
    step: int = 0
    """Step of the latest saved state."""
    total_steps: int = 0
    samples_seen: int = 0
    checkpoints: list[CheckpointEntry] = field(default_factory=list)
    tracked: dict[str, int] = field(default_factory=dict)
    """Tracker -> last step that was sent to it before the run was resumed; it may be after the step of the state."""
    best_checkpoint: str | None = None
    """File of the checkpoint with the lowest validation loss, if there is any."""
    failure: str | None = None
    diverged_step: int | None = None
    """The step whose loss or gradient was not finite, if that ended the run."""
    seconds: float = 0
    """Of all commands of the run so far, encoding included, to the latest saved state or the end."""
    memory: MemoryUse | None = None
    """Of the latest command, on a GPU."""
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    updated: str = ""
    tf32: list[str] = field(default_factory=list)
    """Kinds of float32 operations that the latest command computed in TF32."""
    versions: dict[str, str] = field(default_factory=lambda: package_versions())

    def save(self, folder: Path) -> None:
        """Write `run.json` atomically."""
        best = self._best()
        self.best_checkpoint = best.file if best else None
        self.updated = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(folder / RECORD, asdict(self))

    def _best(self) -> CheckpointEntry | None:
        measured = [entry for entry in self.checkpoints if entry.validation_loss is not None]
        return min(measured, key=lambda entry: (entry.validation_loss, entry.step), default=None)

    def forget_old_checkpoints(self, keep: int, keep_best: bool) -> list[CheckpointEntry]:
        """Remove and return all but the latest `keep` checkpoints, and possibly the best one."""
        best = self._best() if keep_best else None
        latest = sorted(self.checkpoints, key=lambda entry: entry.step)[-keep:]
        old = [entry for entry in self.checkpoints if entry not in latest and entry != best]
        self.checkpoints = [entry for entry in self.checkpoints if entry not in old]
        return old

    def has_checkpoint_of(self, step: int) -> bool:
        """Return whether a checkpoint of `step` was saved."""
        return any(entry.step == step for entry in self.checkpoints)

    def drop_missing_checkpoints(self, folder: Path) -> None:
        """Remove checkpoints whose files no longer exist."""
        self.checkpoints = [entry for entry in self.checkpoints if (folder / entry.file).exists()]

    def add_checkpoint(self, entry: CheckpointEntry) -> None:
        """Add a checkpoint, replacing one of the same name."""
        self.checkpoints = [known for known in self.checkpoints if known.file != entry.file] + [entry]


def read_record(folder: Path) -> RunRecord | None:
    """Return the record of the run in a folder; None if there is no record.

    Raises:
        DiffSynthError: if the file is damaged.
    """
    path = folder / RECORD
    return read_json(path, RunRecord, "choose another `--output_path`") if os.path.lexists(path) else None


def package_versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Return the versions of Python and of the packages that affect a run's numbers, some runs' of `more` packages."""
    return {"python": platform.python_version(), **{name: version(name) for name in (*RECORDED_PACKAGES, *more)}}


@dataclass(frozen=True)
class PreviewImage:
    """One preview: `file` in the folder of its step; `num_frames`: 1 for an image."""

    file: str
    prompt: str
    seed: int
    height: int
    width: int
    num_frames: int


@dataclass(frozen=True)
class PreviewList:
    """All previews after a step."""

    step: int
    images: tuple[PreviewImage, ...]

    def save(self, folder: Path) -> None:
        """Write `images.json`, which says that all files in the folder are whole.

        Raises:
            DiffSynthError: if the disk refuses.
        """
        write_json(folder / PREVIEW_LIST, asdict(self))


def preview_folder(run: Path, step: int) -> Path:
    """Return the folder of the previews after a step."""
    return run / PREVIEWS / f"step-{step}"


def read_previews(run: Path) -> dict[int, PreviewList]:
    """Return step -> previews, in the order of the steps, of the folders that are whole."""
    read = filter(None, map(read_preview_list, run.glob(f"{PREVIEWS}/step-*")))
    return dict(sorted((one.step, one) for one in read))


def read_preview_list(folder: Path) -> PreviewList | None:
    """Return the previews of one step; None if the folder is not whole: its list is missing or damaged."""
    path = folder / PREVIEW_LIST
    try:
        return read_json(path, PreviewList, "draw them again") if path.exists() else None
    except DiffSynthError:
        return None


def forget_previews(run: Path, after: int) -> None:
    """Delete the lists of the previews of later steps, which a run that continues after step `after` draws again."""
    for step in read_previews(run):
        if step > after:
            (preview_folder(run, step) / PREVIEW_LIST).unlink(missing_ok=True)


@contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Exclude other runs from a folder within the block; the lock is released however the process ends.

    Temporary files of killed runs are deleted. A folder that has no record at the end is removed if it is empty.

    Raises:
        DiffSynthError: if another run uses the folder.
    """

    def busy() -> None:
        raise DiffSynthError(
            f"`{folder}` is in use by another run", "wait for it to finish, or choose another `--output_path`"
        )

    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = open_lock(folder / LOCK)
    except OSError as error:
        raise DiffSynthError(
            f"cannot write to `{folder}`: {error.strerror}", "choose another `--output_path`"
        ) from error
    with holding(descriptor, busy):
        for leftover in folder.glob(".*.tmp"):  # of a run that was killed while writing
            leftover.unlink(missing_ok=True)
        try:
            yield
        finally:
            if not (folder / RECORD).exists():
                (folder / LOCK).unlink(missing_ok=True)
                with suppress(OSError):  # not empty
                    folder.rmdir()


def folder_identity(folder: Path) -> tuple[int, int] | None:
    """Return device and inode, which differ for another folder of the same name; None if it is missing."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def checkpoint_files(folder: Path) -> list[str]:
    """Return the names of checkpoint files in a folder, whichever program wrote them."""
    return sorted(path.name for pattern in CHECKPOINT_NAMES for path in folder.glob(pattern))


def recorded_steps(path: Path) -> list[int]:
    """Return the steps of the complete lines of a file such as `metrics.jsonl`, if it exists."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [int(step) for step in map(_step_of, lines) if math.isfinite(step)]


class MetricsFile:
    """A file such as `metrics.jsonl`: one line per step, written when the step is complete."""

    def __init__(self, path: Path, done_steps: int, warn: Callable[[str], None]) -> None:
        """Open the file to append after step `done_steps`; lines of later steps, from before an interruption, are
        removed.

        Args:
            warn: called once if a line cannot be written, which does not stop the run.
        """
        self._path, self._warn, self._warned = path, warn, False
        if self._path.exists():
            lines = [
                line
                for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines()
                if _step_of(line) <= done_steps
            ]
            write_text(self._path, "".join(f"{line}\n" for line in lines))
        self._lines = LineFile(self._path)

    def write(self, values: Mapping[str, float | int | None]) -> None:
        """Append the values of a step; non-finite ones become null."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        try:
            self._lines.write(json.dumps(finite))
        except OSError as error:
            if not self._warned:
                self._warned = True
                self._warn(
                    f"`{self._path}` is missing steps from {values['step']} on: {error.strerror}; the run continues"
                )

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def _step_of(line: str) -> float:
    """Return the step of a line; infinity for a truncated line, so that it is removed."""
    try:
        return as_type(as_type(parse_json(line), dict[str, Any]).get("step"), int)
    except (InvalidJson, WrongType):
        return float("inf")

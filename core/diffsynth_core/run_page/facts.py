"""What is known of a run from the files in its folder, read again and again while it goes on. No torch."""

import fcntl
import json
import math
import os
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Literal, get_args

from diffsynth_core.checkpoints.run_folder import (
    LOCK,
    LOG,
    METRICS,
    RECORD,
    VALIDATIONS,
    CheckpointEntry,
    RunRecord,
)
from diffsynth_core.errors import DiffSynthError, list_names, truncate
from diffsynth_core.json_files import WrongType, as_type, read_json
from diffsynth_core.run_page.previews import Preview, PreviewReader
from diffsynth_core.run_page.series import StepSeries, as_number, smooth, smoothing_steps

NO_RUN_HINT = f"pass the folder of a run, which contains `{RECORD}`"
"""What to do about a folder that is not that of a run."""
TIMED_STEPS = 50
"""The duration of a step is the mean over up to so many of the latest ones."""
QUIET_SECONDS = 60
"""A run that has written nothing for so long may have been killed."""
BAND_PREFIX = "validation_loss_band_"
"""Of the names of the losses by band of timesteps in `validation.jsonl`, with their numbers from 1."""

Status = Literal["running", "completed", "interrupted", "failed", "killed"]
"""As recorded, or killed: recorded as running, but no process of this machine holds the folder any more."""
STATUSES: dict[str, Status] = {status: status for status in get_args(Status)}
"""Status by its name."""


@dataclass(frozen=True)
class ValidationLoss:
    """The loss on held-out samples after a step, in all and by band of timesteps, the noisiest first."""

    step: int
    loss: float
    bands: tuple[float, ...]


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run.

    Attributes:
        folder: absolute.
        written: when the run last wrote something, in seconds since 1970.
    """

    folder: Path
    record: RunRecord
    status: Status
    series: StepSeries
    validations: tuple[ValidationLoss, ...]
    previews: tuple[Preview, ...]
    written: float

    @property
    def step(self) -> int:
        """Completed steps, whether their state is saved or not."""
        return max(self.record.step, self.series.steps[-1] if len(self.series) else 0)

    @property
    def smoothing_steps(self) -> int:
        """About how many steps the loss is averaged over."""
        return smoothing_steps(self.record.total_steps)

    @cached_property
    def smoothed_loss(self) -> "array[float]":
        """The moving average of the loss at each step."""
        return smooth(self.series["loss"], self.smoothing_steps)

    @property
    def step_seconds(self) -> float:
        """Mean duration of the latest steps, without the first, which warms up; NaN before there are any."""
        timed = min(TIMED_STEPS, len(self.series) - 1)
        return self.series.mean_of_last("seconds", timed) if timed > 0 else math.nan

    @property
    def seconds_left(self) -> float:
        """Of the steps left at the pace of the latest ones, without what is done between them; NaN if unknown or
        the run has ended.
        """
        left = self.record.total_steps - self.step
        return left * self.step_seconds if self.status == "running" else math.nan

    @property
    def best(self) -> CheckpointEntry | None:
        """The checkpoint with the lowest validation loss."""
        return next((one for one in self.record.checkpoints if one.file == self.record.best_checkpoint), None)

    @property
    def latest_checkpoint(self) -> CheckpointEntry | None:
        """The checkpoint of the latest step."""
        return max(self.record.checkpoints, key=lambda entry: entry.step, default=None)


def read_run(folder: Path) -> RunFacts:
    """Return what is known of the run in a folder; see `RunReader.read`."""
    return RunReader(folder).read()


class RunReader:
    """Reads the files of a run; of those that grow, only what was added since it read them before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._metrics = _GrowingLines(self.folder / METRICS)
        self._validations = _GrowingLines(self.folder / VALIDATIONS)
        self._series = StepSeries()
        self._losses: list[ValidationLoss] = []
        self._previews = PreviewReader(self.folder)

    def read(self) -> RunFacts:
        """Return what is known now.

        Raises:
            DiffSynthError: if the folder is not that of a run, or its record is damaged.
        """
        record = _read_record(self.folder)
        lines, again = self._metrics.read()
        if again:
            self._series = StepSeries()
        for step, line in lines:
            self._series.add(step, line)
        lines, again = self._validations.read()
        if again:
            self._losses = []
        self._losses += [_validation(step, line) for step, line in lines]
        written = self._last_written()
        status: Status = "killed" if _is_killed(self.folder, record, written) else STATUSES[record.status]
        return RunFacts(self.folder, record, status, self._series, tuple(self._losses), self._previews.read(), written)

    def _last_written(self) -> float:
        return max((_modified(self.folder / name) for name in (RECORD, METRICS, VALIDATIONS, LOG)), default=0.0)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _read_record(folder: Path) -> RunRecord:
    """Return the record of a run, also of a later version: what this one does not know is left out."""
    path = folder / RECORD
    if not os.path.lexists(path):
        what = "is not the folder of a run" if folder.exists() else "does not exist"
        raise DiffSynthError(f"`{folder}` {what}", NO_RUN_HINT)
    content = read_json(path, dict[str, Any], NO_RUN_HINT)
    known = _known(content, RunRecord)
    checkpoints = known.get("checkpoints")
    if isinstance(checkpoints, list):
        known["checkpoints"] = [_known(entry, CheckpointEntry) for entry in checkpoints]
    try:
        record = as_type(known, RunRecord)
        if record.status not in STATUSES:
            raise WrongType(f"`status` is `{truncate(record.status)}`, expected {list_names(list(STATUSES))}")
    except WrongType as error:
        raise DiffSynthError(f"`{path}`: {error}", NO_RUN_HINT) from error
    return record


def _known(content: Any, kind: type) -> Any:
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in content.items() if name in names} if isinstance(content, dict) else content


def _is_killed(folder: Path, record: RunRecord, written: float) -> bool:
    """Return whether a run ended without recording it: it writes nothing, and nobody holds its lock."""
    if record.status != "running" or time.time() - written < QUIET_SECONDS:
        return False
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return True  # a run that goes on has one
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # held by the run, or unknown on a file system without locks
        return False
    finally:
        os.close(descriptor)
    return True


def _validation(step: int, line: dict[str, Any]) -> ValidationLoss:
    names = (f"{BAND_PREFIX}{number}" for number in count(1))
    bands = [as_number(line[name]) for name in takewhile(line.__contains__, names)]
    return ValidationLoss(step, as_number(line.get("validation_loss")), tuple(bands))


class _GrowingLines:
    """The complete lines of a file of JSON objects with a `step`, as the file grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity: tuple[int, int] | None = None
        self._offset = 0

    def read(self) -> tuple[Iterator[tuple[int, dict[str, Any]]], bool]:
        """Return the lines after those read before, and whether these are all: the file was replaced by another one, as
        when a run resumes.
        """
        try:
            with self._path.open("rb") as stream:
                status = os.fstat(stream.fileno())
                identity = (status.st_dev, status.st_ino)
                again = identity != self._identity or status.st_size < self._offset
                if again:
                    self._identity, self._offset = identity, 0
                stream.seek(self._offset)
                data = stream.read()
        except OSError:
            again, data = self._identity is not None, b""
            self._identity = None
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return _objects(complete), again


def _objects(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    for line in data.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and type(value.get("step")) is int and 0 <= value["step"] < 2**63:
            yield value["step"], value

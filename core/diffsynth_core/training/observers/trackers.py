"""Trackers: where the metrics of a run can be looked at beside its folder, most of them through accelerate."""

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from PIL import Image

from diffsynth_core.checkpoints.run_folder import CSV_FILE, TENSORBOARD, RunRecord, read_preview_list
from diffsynth_core.config.documents import format_value
from diffsynth_core.config.parameters import as_plain
from diffsynth_core.files import LineFile, write_text
from diffsynth_core.planning.output.trackers import chosen_trackers
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import Reporter
from diffsynth_core.training.observers.metrics import metrics_of, metrics_of_validation
from diffsynth_core.training.observers.observer import Observer, StepReport, ValidationReport

DEFAULT_PROJECT = "DiffSynth-Studio"
"""Project of runs for which none is named, as in DiffSynth-Studio."""
CSV_COLUMNS = ("step", "key", "value")


class Tracker(Protocol):
    """The part of `accelerate.tracking.GeneralTracker` that is used."""

    def start(self) -> None:
        """Open the run in the tracker."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Store the parameters of the run."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Add the values of a step."""

    def finish(self) -> None:
        """Close the run in the tracker."""


class ImageTracker(Tracker, Protocol):
    """A tracker that takes images too."""

    def log_images(self, values: Mapping[str, np.ndarray[Any, Any]], step: int, **options: Any) -> None:
        """Add images of a step, each `[1, H, W, 3]` uint8, by name."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run.

    Attributes:
        id: the same whenever the run is resumed; empty for runs of versions without it.
        first_step: completed steps with which the run starts or continues.
        parameters: plain.
    """

    folder: Path
    id: str
    first_step: int
    parameters: Mapping[str, Any]

    def subfolder(self, name: str) -> Path:
        """Create a folder for the files of a tracker in that of the run, and return it."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return folder

    def project(self, tracker: str) -> str:
        """Return the project that the run belongs to: that of the parameters, the environment, or the default."""
        name = f"{tracker}_project"
        return self.parameters[name] or os.environ.get(name.upper()) or DEFAULT_PROJECT


class CsvTracker:
    """Writes a row `step,key,value` for each metric of a step."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._path, self._first_step = folder / CSV_FILE, first_step

    def start(self) -> None:
        """Open the file; rows of steps after the first step, from before an interruption, are removed."""
        rows: list[list[str]] = []
        if self._path.exists():
            with self._path.open(encoding="utf-8", newline="") as stream:
                rows = [row for row in csv.reader(stream) if _step_of(row) <= self._first_step]
        write_text(self._path, "".join(f"{_as_line(row)}\n" for row in (CSV_COLUMNS, *rows)))
        self._lines = LineFile(self._path)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Do nothing: `run.json` beside the file has the parameters."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._lines.write("\n".join(_as_line((step, key, value)) for key, value in values.items()))

    def finish(self) -> None:
        self._lines.close()


def _as_line(row: Iterable[object]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="").writerow(row)
    return stream.getvalue()


def _step_of(row: list[str]) -> float:
    """Return the step of a row; infinity for the header and for a truncated row, so that it is removed."""
    complete = len(row) == len(CSV_COLUMNS) and row[0].isdecimal() and row[2]
    return int(row[0]) if complete else float("inf")


def _csv(run: TrackedRun) -> Tracker:
    return CsvTracker(run.folder, run.first_step)


def _tensorboard(run: TrackedRun) -> Tracker:
    from accelerate.tracking import TensorBoardTracker

    # Its readers drop what earlier files hold of `purge_step` and later steps.
    purged = {"purge_step": run.first_step + 1} if run.first_step else {}
    tracker: Tracker = TensorBoardTracker(TENSORBOARD, run.folder, **purged)
    return tracker


def _wandb(run: TrackedRun) -> Tracker:
    import wandb
    from accelerate.tracking import WandBTracker

    mode = os.environ.get("WANDB_MODE")
    if mode is None and not wandb.login(prompt=False):
        mode = "offline"  # wandb would ask for a key at the terminal, which a run must not wait for
    tracker: Tracker = WandBTracker(
        run.project("wandb"),
        name=run.folder.name,
        id=run.id or None,
        resume="allow",
        dir=str(run.subfolder("wandb_log")),
        mode=mode,
        settings=wandb.Settings(console="off", disable_git=True),
    )
    return tracker


def _trackio(run: TrackedRun) -> Tracker:
    from accelerate.tracking import TrackioTracker

    # A run is resumed by its name, which must then be unique.
    name = f"{run.folder.name}-{run.id[:8]}"
    tracker: Tracker = TrackioTracker(
        run.project("trackio"), name=name, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
    )
    return tracker


def _swanlab(run: TrackedRun) -> Tracker:
    import swanlab
    from accelerate.tracking import SwanLabTracker

    tracker: Tracker = SwanLabTracker(
        run.project("swanlab"),
        name=run.folder.name,
        id=run.id or None,
        resume="allow",
        log_dir=str(run.subfolder("swanlab_log")),
        settings=swanlab.Settings(interactive=False),  # a run must not wait for a key
    )
    return tracker


BUILDERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "csv": _csv,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "swanlab": _swanlab,
}
"""Tracker -> how it is made."""
REWINDING = ("csv", "tensorboard")
"""Trackers that take steps back when a run resumes before them; to the others, steps that were sent are not sent
again.
"""


IMAGE_OPTIONS: Mapping[str, Mapping[str, str]] = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}, "swanlab": {}}
"""Trackers that are `ImageTracker`s -> options of `log_images`."""


class TrackerObserver(Observer):
    """Sends metrics to a tracker, and previews that are images to those that take some. If it fails, this is told once,
    and the run continues without it.
    """

    def __init__(self, name: str, run: TrackedRun, sent: int | None, reporter: Reporter) -> None:
        """Start the tracker.

        Args:
            sent: last step that earlier commands sent to it; None if there were none.
        """
        self._name, self._reporter = name, reporter
        self._sent = -1 if name in REWINDING or sent is None else sent
        self._tracker: Tracker | None = None
        try:
            tracker = BUILDERS[name](run)
            tracker.start()
            if sent is None:
                tracker.store_init_configuration(as_shown(run.parameters))
            self._tracker = tracker
        except Exception as error:  # whatever a package or service raises
            self._give_up("does not start", error)

    def on_step(self, report: StepReport) -> None:
        self._log(metrics_of(report), report.step)

    def on_preview(self, folder: Path, step: int) -> None:
        listed = read_preview_list(folder)
        if self._name in IMAGE_OPTIONS and listed:
            names = [one.file for one in listed.images if one.num_frames == 1]
            options = IMAGE_OPTIONS[self._name]

            def send(tracker: Tracker) -> None:
                images = {f"preview_{Path(name).stem}": _read_image(folder / name) for name in names}
                cast(ImageTracker, tracker).log_images(images, step=step, **options)

            self._send(step, send)

    def on_validation(self, report: ValidationReport) -> None:
        self._log(metrics_of_validation(report), report.step)

    def _log(self, values: dict[str, float | int], step: int) -> None:
        sent = {name: value for name, value in values.items() if name != "step"}
        self._send(step, lambda tracker: tracker.log(sent, step=step))

    def _send(self, step: int, send: Callable[[Tracker], None]) -> None:
        if self._tracker and step > self._sent:
            try:
                send(self._tracker)
            except Exception as error:
                self._give_up(f"has failed at step {step}", error)

    def on_end(self) -> None:
        if self._tracker:
            try:
                self._tracker.finish()
            except Exception as error:
                self._give_up("has not finished", error)

    def _give_up(self, what: str, error: Exception) -> None:
        self._tracker = None
        reason = str(error) or type(error).__name__
        self._reporter.warn(f"the tracker `{self._name}` {what}: {reason}; the run continues without it")


def _read_image(path: Path) -> np.ndarray[Any, Any]:
    """Return an image as `[1, H, W, 3]` uint8."""
    return np.asarray(Image.open(path).convert("RGB"))[None]


def as_shown(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain parameters as every tracker takes them: without None, and lists as text."""
    return {
        name: value if isinstance(value, (bool, int, float)) else format_value(value)
        for name, value in values.items()
        if value is not None
    }


def tracker_observers(plan: RunPlan, record: RunRecord, reporter: Reporter) -> list[TrackerObserver]:
    """Start the trackers of a run."""
    parameters = as_plain(plan.parameters)
    run = TrackedRun(plan.parameters.output_path, record.id, plan.output.start.first_step, parameters)
    return [TrackerObserver(name, run, record.tracked.get(name), reporter) for name in chosen_trackers(parameters)]

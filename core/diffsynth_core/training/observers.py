"""Observers: what follows a run without changing it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from diffsynth_core.checkpoints.run_folder import METRICS, VALIDATIONS, MetricsFile
from diffsynth_core.progress import Task, format_bytes

LOSS_AVERAGE_STEPS = 50
"""The displayed loss is a running mean over about this many steps."""


@dataclass(frozen=True)
class StepReport:
    """One completed optimizer step.

    Attributes:
        step: completed steps, this one included.
        samples_seen: samples trained on so far, over all processes.
        loss: mean over the samples of the step, over all processes.
        gradient_norm: before clipping.
        seconds: duration of the step; `data_seconds` of it were spent waiting for data.
    """

    step: int
    epoch: int
    samples_seen: int
    loss: float
    learning_rate: float
    gradient_norm: float
    seconds: float
    data_seconds: float


@dataclass(frozen=True)
class ValidationReport:
    """The loss on the held-out samples.

    Attributes:
        step: completed steps.
        loss: mean over samples and bands.
        bands: mean over samples in each band of timesteps, from the noisiest to the cleanest.
    """

    step: int
    loss: float
    bands: tuple[float, ...]


class Observer:
    """Follows a run in one process. Methods that an observer does not override do nothing."""

    def on_step(self, report: StepReport) -> None:
        """Called after each optimizer step."""

    def on_validation(self, report: ValidationReport) -> None:
        """Called after the loss on held-out samples was measured: before the first step, and after some."""

    def on_preview(self, folder: Path, step: int) -> None:
        """Called after previews were drawn and `folder` lists them (`images.json`); in the main process only."""

    def on_save(self, path: Path, step: int) -> None:
        """Called after a file of a checkpoint was written: the weights, then their averages, if there are some; in the
        main process only.
        """

    def on_state(self, path: Path, step: int) -> None:
        """Called after a state was saved; in the main process only."""

    def on_end(self) -> None:
        """Called when the run ends, however it ends, and its record says how."""


def metrics_of(report: StepReport) -> dict[str, float | int]:
    """Return what is recorded of a step, by the names in `metrics.jsonl` and in trackers."""
    return {
        "step": report.step, "epoch": report.epoch, "samples_seen": report.samples_seen, "loss": report.loss,
        "lr": report.learning_rate, "grad_norm": report.gradient_norm, "seconds": round(report.seconds, 6),
        "data_seconds": round(report.data_seconds, 6),
    }  # fmt: skip


def metrics_of_validation(report: ValidationReport) -> dict[str, float | int]:
    """Return what is recorded of a validation, by the names in `validation.jsonl` and in trackers."""
    bands = {f"validation_loss_band_{number}": loss for number, loss in enumerate(report.bands, 1)}
    return {"step": report.step, "validation_loss": report.loss, **(bands if len(bands) > 1 else {})}


class MetricsObserver(Observer):
    """Writes `metrics.jsonl`, and `validation.jsonl` for a run that validates."""

    def __init__(self, folder: Path, first_step: int, warn: Callable[[str], None], validates: bool = False) -> None:
        self._file = MetricsFile(folder / METRICS, first_step, warn)
        self._validations = MetricsFile(folder / VALIDATIONS, first_step, warn) if validates else None

    def on_validation(self, report: ValidationReport) -> None:
        if self._validations:
            self._validations.write(metrics_of_validation(report))

    def on_step(self, report: StepReport) -> None:
        self._file.write(metrics_of(report))

    def on_end(self) -> None:
        self._file.close()
        if self._validations:
            self._validations.close()


class ProgressObserver(Observer):
    """Shows the running mean of the loss and the memory in use with the progress of the run."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._task, self._device = task, device
        self._mean, self._steps = 0.0, 0

    def on_step(self, report: StepReport) -> None:
        self._steps += 1
        self._mean += (report.loss - self._mean) / min(self._steps, LOSS_AVERAGE_STEPS)
        self._task.advance(loss=f"{self._mean:.4f}", memory=format_bytes(memory_in_use(self._device)))


def memory_in_use(device: torch.device) -> int:
    """Return the peak memory allocated on an accelerator, or the resident memory of this process, in bytes."""
    peak = peak_memory(device)
    if peak is not None:
        return peak
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory allocated on an accelerator, in bytes; None for the CPU."""
    return None if device.type == "cpu" else torch.accelerator.max_memory_allocated()

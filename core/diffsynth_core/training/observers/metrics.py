"""What a run records of its steps and validations."""

from collections.abc import Callable
from pathlib import Path

from diffsynth_core.checkpoints.run_folder import METRICS, VALIDATIONS, MetricsFile
from diffsynth_core.training.observers.observer import Observer, StepReport, ValidationReport


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

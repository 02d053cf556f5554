"""Observers: what follows a run without changing it."""

from dataclasses import dataclass
from pathlib import Path


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

"""Progress as the terminal shows it."""

import torch

from diffsynth_core.progress import Task, format_bytes
from diffsynth_core.training.observers.observer import Observer, StepReport

LOSS_AVERAGE_STEPS = 50
"""The displayed loss is a running mean over about this many steps."""


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

"""What limits a step: some steps traced by the profiler of PyTorch, for Perfetto, and their time shared out."""

import gzip
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, schedule

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.files import atomic_write, temporary_sibling
from diffsynth_core.planning.probing import PROFILE_WARM_UP
from diffsynth_core.training.observers.observer import Observer, StepReport

KERNELS, COPIES = ("kernel",), ("gpu_memcpy", "gpu_memset")
"""Categories of events of a GPU in the traces of PyTorch (libkineto/include/ActivityType.h)."""
MICROSECONDS = 1e-6
"""Unit of times in a trace, in seconds."""
COMPRESSION = 1
"""Level of gzip; higher ones keep the run waiting for a tenth less of the file."""

Event = Mapping[str, Any]


class ProfileObserver(Observer):
    """Traces steps after some that warm up, writes the trace, and says what limits a step; then it does nothing more.

    A run that ends earlier has a trace of the steps until then, if there are any.
    """

    def __init__(self, folder: Path, count: int, device: torch.device, say: Callable[[str], None]) -> None:
        """Begin with the first step.

        Args:
            count: steps to trace.
            say: called once, with where the trace is and what limits a step, or with why there is none.
        """
        self._folder, self._count, self._device, self._say = folder, count, device, say
        self._reports: list[StepReport] = []
        self._profiler: profile | None = profile(
            schedule=schedule(wait=PROFILE_WARM_UP - 1, warmup=1, active=count, repeat=1),
            on_trace_ready=self._write,
        )
        self._profiler.start()

    def on_step(self, report: StepReport) -> None:
        if self._profiler:
            self._reports.append(report)
            self._profiler.step()
            if len(self._reports) == PROFILE_WARM_UP + self._count:
                self.on_end()

    def on_end(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler:
            profiler.stop()
            if len(self._reports) <= PROFILE_WARM_UP:
                self._say("The run ended before a step was traced")

    def _write(self, profiler: profile) -> None:
        traced = self._reports[PROFILE_WARM_UP:]
        if not traced:
            return
        path = self._folder / f"profile-steps-{traced[0].step}-{traced[-1].step}.json.gz"
        try:
            with temporary_sibling(path.with_suffix("")) as plain:
                profiler.export_chrome_trace(str(plain))
                content = plain.read_bytes()
            with atomic_write(path) as temporary:
                temporary.write_bytes(gzip.compress(content, COMPRESSION))
        except DiffSynthError as error:
            self._say(f"No trace: {error}; the run continues")
            return
        shares = step_shares(traced, json.loads(content)["traceEvents"], self._device)
        self._say(f"Traced steps in `{path}`, for ui.perfetto.dev; {limit_in_words(traced, shares)}")


def step_shares(reports: Iterable[StepReport], events: Iterable[Event], device: torch.device) -> dict[str, float]:
    """Return what the time of steps was spent on, as shares of it.

    On a CPU: waiting for data, and computation. On other devices: waiting for data, kernels, copies while no kernel
    ran, and the rest, in which the device had nothing to do but to wait for the host. What kernels of the step before
    do while the host waits for data is counted as kernels.

    Args:
        events: of a trace of these steps.
    """
    known, happened = list(reports), list(events)
    seconds, data = (sum(getattr(one, name) for one in known) for name in ("seconds", "data_seconds"))
    if device.type == "cpu":
        return {"data": data / seconds, "computation": 1 - data / seconds}
    kernels, busy = busy_seconds(happened, KERNELS), busy_seconds(happened, KERNELS + COPIES)
    waiting = min(data, max(0.0, seconds - busy))
    shares = {"data": waiting, "kernels": kernels, "copies": busy - kernels, "host": seconds - busy - waiting}
    return {name: max(0.0, spent / seconds) for name, spent in shares.items()}


def busy_seconds(events: Iterable[Event], categories: tuple[str, ...]) -> float:
    """Return for how long at least one event of these categories lasted."""
    spans = sorted((one["ts"], one["ts"] + one["dur"]) for one in events if one.get("cat") in categories)
    busy, end = 0.0, float("-inf")
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy * MICROSECONDS


WORDS = {
    "data": "waiting for data",
    "kernels": "kernels",
    "copies": "copies alone",
    "host": "waiting for the host",
    "computation": "computation",
}
"""What takes time -> as in "kernels take 90 %"."""


def limit_in_words(reports: list[StepReport], shares: Mapping[str, float]) -> str:
    """Return what takes the most of a step, and the share of each."""
    limit = max(shares, key=lambda name: shares[name])
    parts = ", ".join(f"{WORDS[name]} {share:.0%}" for name, share in shares.items())
    mean = sum(report.seconds for report in reports) / len(reports)
    return f"the limit is {limit}: of {mean:.3g} s a step, traced, {parts}"

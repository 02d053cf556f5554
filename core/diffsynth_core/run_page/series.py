"""The metrics of each step, and a few hundred points of them for a chart. No torch."""

import math
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEP_FIELDS = ("loss", "lr", "grad_norm", "seconds", "data_seconds")
"""Numbers of a line of `metrics.jsonl` that charts show."""
CHART_POINTS = 600
"""Maximum number of points of a curve."""
SMOOTHED_SHARE = 0.02
"""Share of all steps over which the loss is smoothed."""
LEAST_SMOOTHED_STEPS = 10
"""Minimum number of steps over which the loss is smoothed."""


@dataclass(frozen=True)
class Point:
    """Some consecutive steps of a curve: the range and mean of their finite values; NaN if there are none."""

    first: int
    last: int
    low: float
    mean: float
    high: float


class StepSeries:
    """The metrics of all steps so far, 8 bytes a number; NaN where a value was not finite or is missing."""

    def __init__(self) -> None:
        self.steps = array("q")
        self._values = {name: array("d") for name in STEP_FIELDS}

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, field: str) -> "array[float]":
        return self._values[field]

    def add(self, step: int, line: Mapping[str, Any]) -> None:
        """Append a step; `line` is its object of `metrics.jsonl`."""
        self.steps.append(step)
        for name, values in self._values.items():
            values.append(as_number(line.get(name)))

    def last(self, field: str) -> float:
        """Return the latest value of a field; NaN before the first step."""
        return self._values[field][-1] if self.steps else math.nan

    def mean_of_last(self, field: str, steps: int) -> float:
        """Return the mean over the finite values of the latest steps."""
        return mean_of_finite(self._values[field][-steps:])

    def sum_until(self, field: str, step: int) -> float:
        """Return the sum of the finite values of all steps up to `step`."""
        values = self._values[field][: bisect_right(self.steps, step)]
        return float(np.nansum(np.asarray(values))) if len(values) else 0.0


def as_number(value: Any) -> float:
    """Return a number of JSON as a float; NaN for anything else."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def mean_of_finite(values: Sequence[float]) -> float:
    """Return the mean of the finite values; NaN if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def smoothing_steps(total_steps: int) -> int:
    """Return over about how many steps the loss of a run of so many steps is smoothed."""
    return max(LEAST_SMOOTHED_STEPS, round(total_steps * SMOOTHED_SHARE))


def smooth(values: Sequence[float], steps: int) -> "array[float]":
    """Return the exponential moving average over about `steps` values, the mean while there are fewer.

    A value that is not finite leaves it as it was; NaN before the first finite one.
    """
    smoothed, average, count = array("d"), math.nan, 0
    for value in values:
        if math.isfinite(value):
            count += 1
            average = value if count == 1 else average + (value - average) / min(count, steps)
        smoothed.append(average)
    return smoothed


def downsample(steps: Sequence[int], values: Sequence[float], points: int = CHART_POINTS) -> list[Point]:
    """Return a curve of at most so many points, each the lowest, mean and highest value of equally many steps."""
    if not len(steps):
        return []
    of_steps, of_values = np.asarray(steps, np.int64), np.asarray(values, np.float64)
    of_values = np.where(np.isfinite(of_values), of_values, np.nan)
    size = -(-len(of_steps) // points)
    starts = np.arange(0, len(of_steps), size)
    counts = np.add.reduceat(~np.isnan(of_values), starts, dtype=np.int64)
    sums = np.add.reduceat(np.nan_to_num(of_values), starts)
    with np.errstate(invalid="ignore"):
        means = np.where(counts, sums / np.maximum(counts, 1), np.nan)
    ends = np.append(starts[1:], len(of_steps)) - 1
    columns: list[NDArray[Any]] = [
        *(of_steps[starts], of_steps[ends]),
        *(np.fmin.reduceat(of_values, starts), means, np.fmax.reduceat(of_values, starts)),
    ]
    return [Point(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]

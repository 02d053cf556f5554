"""How the few-step sampler is to make a sample's image: what direct distillation reads of a row. No torch."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffsynth_core.config.choices import TRAINING_TIMESTEPS
from diffsynth_core.errors import Problem, raise_if_any

SAMPLING_CODE = "CELL_TYPE"
"""Of the check that finds what is wrong with these cells (data/findings.py)."""
RAND_DEVICES = ("cpu", "cuda")
SEEDS = range(2**63)
STEPS = range(1, TRAINING_TIMESTEPS + 1)


@dataclass(frozen=True)
class Sampling:
    """The seed of the noise, the device whose generator draws it, and how many steps lead from it to the image."""

    seed: int
    rand_device: str
    steps: int


def read_sampling(row: Mapping[str, Any], where: str) -> Sampling:
    """The settings of the sampler in one row.

    Raises:
        FaultsFound: what cannot be read of them, or asks for guidance.
    """
    problems: list[Problem] = []
    seed = _whole_number(row.get("seed"), "seed", SEEDS, where, problems)
    steps = _whole_number(row.get("num_inference_steps"), "num_inference_steps", STEPS, where, problems)
    device = row.get("rand_device")
    if device not in RAND_DEVICES:
        problems.append(_unreadable("rand_device", device, " or ".join(RAND_DEVICES), where))
    if number_of(row.get("cfg_scale")) != 1:
        problems.append(
            Problem(
                f"{where}: column `cfg_scale` holds `{_shown(row.get('cfg_scale'))}`, expected 1: distillation "
                "trains without guidance",
                "set it to 1",
                code=SAMPLING_CODE,
            )
        )
    raise_if_any(problems)
    return Sampling(seed, str(device), steps)


def _whole_number(value: Any, column: str, allowed: range, where: str, problems: list[Problem]) -> int:
    """Return a cell as an integer; 0, with a problem, if it is not one."""
    number = number_of(value)
    whole = _exactly(value, number)
    if whole is None or whole not in allowed:
        expected = f"an integer from {allowed.start} to {allowed.stop - 1}"
        problems.append(_unreadable(column, value, expected, where))
        return 0
    return whole


def _exactly(value: Any, number: float) -> int | None:
    """A whole number without what a float would take from a large one; None where it is none."""
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    return int(value if isinstance(value, int) else number) if number % 1 == 0 else None


def number_of(value: Any) -> float:
    """Return a cell as a finite number; NaN if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _unreadable(column: str, value: Any, expected: str, where: str) -> Problem:
    if value in (None, ""):
        return Problem(f"{where}: column `{column}` is empty, expected {expected}", "fill it in", code=SAMPLING_CODE)
    what = f"{where}: column `{column}` holds `{_shown(value)}`, expected {expected}"
    return Problem(what, "fix the cell", code=SAMPLING_CODE)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

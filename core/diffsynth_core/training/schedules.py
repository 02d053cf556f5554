"""Table of the learning-rate schedules, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}
"""`lr_scheduler` -> factor of the learning rate; `progress` goes from 0 at the end of the warmup to 1 one step after
the last."""


def learning_rate(step: int, base: float, scheduler: str, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of `step` (from 0): linear warmup, which reaches `base` at its last step, and then the
    schedule.
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    return base * SCHEDULES[scheduler]((step - warmup_steps) / max(1, total_steps - warmup_steps))

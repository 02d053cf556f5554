"""Learning-rate schedules as a pure function."""

import math


def learning_rate(step: int, base: float, scheduler: str, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of `step` (from 0).

    Linear warmup reaches `base` at the last warmup step; then `constant` stays, and `linear` and `cosine` decay such
    that they would reach 0 one step after the last.
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    if scheduler == "constant":
        return base
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base * (1 - progress) if scheduler == "linear" else base * (1 + math.cos(math.pi * progress)) / 2

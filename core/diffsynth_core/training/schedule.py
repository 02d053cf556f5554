"""The learning rate of a step, as a pure function."""

import math


def learning_rate(step: int, base: float, scheduler: str, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of `step` (from 0).

    Warm-up rises along a line and reaches `base` with its last step; then `constant` stays, `linear` and `cosine` fall
    towards 0 behind the last step.
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    if scheduler == "constant":
        return base
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base * (1 - share) if scheduler == "linear" else base * (1 + math.cos(math.pi * share)) / 2

"""When a run validates, and what on. No torch."""

import math
from collections.abc import Hashable

from diffsynth_core.config.choices import TRAINING_TIMESTEPS
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.tasks import TASKS
from diffsynth_core.planning.output.saves import save_interval
from diffsynth_core.planning.plan import RunPlan

BANDS = 4
"""Parts of the timesteps at which each held-out sample is measured, once in each."""


def count_bands(parameters: Parameters) -> int:
    """Return in how many parts of the timesteps each held-out sample is measured: one if a loss is of all timesteps."""
    if TASKS[parameters.task].objective != "sft":
        return 1
    low, high = (
        int(share * TRAINING_TIMESTEPS)
        for share in (parameters.min_timestep_boundary, parameters.max_timestep_boundary)
    )
    return min(BANDS, high - low)


def held_out_batches(plan: RunPlan) -> list[tuple[int, ...]]:
    """Return the indices of the held-out samples in micro-batches, each of one bucket."""
    buckets: dict[Hashable, list[int]] = {}
    for index in plan.data.held_out:
        buckets.setdefault(plan.data.samples.samples[index].bucket, []).append(index)
    size = plan.parameters.batch_size
    return [
        tuple(members[start : start + size]) for members in buckets.values() for start in range(0, len(members), size)
    ]


def validation_is_due(plan: RunPlan, done: int) -> bool:
    """Return whether the run validates after `done` steps: at both ends, with each checkpoint, and between."""
    every = plan.parameters.validate_every
    ends = done in (0, plan.data.steps.total_steps)
    return bool(plan.data.held_out) and (
        ends or done % save_interval(plan) == 0 or (every is not None and done % every == 0)
    )


def count_validations(plan: RunPlan, first: int, last: int) -> int:
    """Return how often the run validates after steps `first + 1` to `last`."""
    if not plan.data.held_out or last <= first:
        return 0
    saves, every = save_interval(plan), plan.parameters.validate_every or save_interval(plan)
    both = math.lcm(saves, every)

    def until(done: int) -> int:
        return done // saves + done // every - done // both

    at_end = last == plan.data.steps.total_steps and last % saves != 0 and last % every != 0
    return until(last) - until(first) + at_end

"""After which steps a run draws previews, and what that takes. No torch."""

from diffsynth_core.planning.output.saves import save_interval
from diffsynth_core.planning.plan import RunPlan


def preview_interval(plan: RunPlan) -> int:
    """Return the number of steps from one drawing to the next."""
    return plan.parameters.preview_every or save_interval(plan)


def preview_is_due(plan: RunPlan, done: int) -> bool:
    """Return whether the run draws previews after `done` steps: at both ends, and between."""
    ends = done in (0, plan.data.steps.total_steps)
    return bool(plan.previews) and (ends or done % preview_interval(plan) == 0)


def count_drawings(plan: RunPlan, first: int, last: int) -> int:
    """Return how often the run draws previews after steps `first + 1` to `last`."""
    if not plan.previews or last <= first:
        return 0
    every = preview_interval(plan)
    at_end = last == plan.data.steps.total_steps and last % every != 0
    return last // every - first // every + at_end


def passes_of_drawing(plan: RunPlan) -> int:
    """Return the forward passes of the denoiser for all previews once: two in each sampling step with guidance."""
    return sum(job.steps * (2 if job.is_guided else 1) for job in plan.previews)

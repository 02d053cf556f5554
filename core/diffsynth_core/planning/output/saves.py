"""After which steps a run saves. No torch."""

from diffsynth_core.planning.plan import RunPlan


def save_interval(plan: RunPlan) -> int:
    """Steps from one checkpoint to the next."""
    return plan.parameters.save_steps or plan.data.steps.steps_per_epoch


def state_interval(plan: RunPlan) -> int:
    """Steps from one state to the next."""
    return plan.parameters.save_state_steps or save_interval(plan)


def checkpoint_is_due(plan: RunPlan, done: int) -> bool:
    """Return whether the run saves a checkpoint after `done` steps: at the end, and every `save_interval`."""
    return done == plan.data.steps.total_steps or done % save_interval(plan) == 0


def state_is_due(plan: RunPlan, done: int) -> bool:
    """Return whether the run saves its state after `done` steps: at the end, and every `state_interval`."""
    return done == plan.data.steps.total_steps or done % state_interval(plan) == 0


def count_checkpoints(plan: RunPlan) -> int:
    """How many a run writes: every `save_steps`, or at the end of each epoch, and the last."""
    total = plan.data.steps.total_steps
    return -(-total // save_interval(plan)) if total else 0


def count_states(plan: RunPlan) -> int:
    """How many states a run writes."""
    return -(-plan.data.steps.total_steps // state_interval(plan))

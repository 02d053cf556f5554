"""Table of the objectives."""

from collections.abc import Callable

from diffsynth_core.config.tasks import TASKS
from diffsynth_core.models.family import Family
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.training.distillation import DirectDistillation
from diffsynth_core.training.losses import LOSSES
from diffsynth_core.training.objective import FlowMatching, Objective
from diffsynth_core.training.timesteps import TIMESTEPS, timestep_range


def _flow_matching(plan: RunPlan, family: Family) -> Objective:
    params, training = plan.parameters, plan.training
    return FlowMatching(
        family.sigmas(),
        timestep_range(params.min_timestep_boundary, params.max_timestep_boundary),
        TIMESTEPS[training.timesteps],
        LOSSES[training.loss],
    )


def _direct_distillation(plan: RunPlan, family: Family) -> Objective:
    return DirectDistillation(family.sigmas, LOSSES[plan.training.loss])


OBJECTIVES: dict[str, Callable[[RunPlan, Family], Objective]] = {
    "sft": _flow_matching,
    "direct_distill": _direct_distillation,
}
"""Objective of a task -> constructor."""


def make_objective(plan: RunPlan, family: Family) -> Objective:
    """Create the objective of a run's task."""
    return OBJECTIVES[TASKS[plan.parameters.task].objective](plan, family)

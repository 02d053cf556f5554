"""The objectives there are, in one table."""

from collections.abc import Callable

from diffsynth_core.config.tasks import TASKS
from diffsynth_core.models.family import Family
from diffsynth_core.planning.plan import Plan
from diffsynth_core.training.distillation import DirectDistillation
from diffsynth_core.training.objective import FlowMatching, Objective


def _flow_matching(plan: Plan, family: Family) -> Objective:
    settings = plan.parameters
    return FlowMatching(family.sigmas(), settings.min_timestep_boundary, settings.max_timestep_boundary)


def _direct_distillation(plan: Plan, family: Family) -> Objective:
    return DirectDistillation(family.sigmas)


OBJECTIVES: dict[str, Callable[[Plan, Family], Objective]] = {
    "sft": _flow_matching,
    "direct_distill": _direct_distillation,
}
"""Objective of a task -> what makes it for a run."""


def make_objective(plan: Plan, family: Family) -> Objective:
    """What the task of a run minimises."""
    return OBJECTIVES[TASKS[plan.parameters.task].objective](plan, family)

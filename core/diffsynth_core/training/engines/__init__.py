"""The engines, one of which distributes the steps of a run over processes."""

from accelerate import Accelerator

from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.training.engines.engine import Engine
from diffsynth_core.training.engines.fsdp import ShardedEngine
from diffsynth_core.training.engines.fused import FusedEngine
from diffsynth_core.training.engines.replicated import ReplicatedEngine
from diffsynth_core.training.engines.zero import STAGES, ZeroEngine


def make_engine(plan: RunPlan, accelerator: Accelerator) -> Engine:
    """Create the engine that a plan asks for."""
    settings = plan.parameters
    if settings.fused_backward:
        return FusedEngine(accelerator, settings.max_grad_norm)
    if plan.machine.engine.name == "fsdp2":
        return ShardedEngine(accelerator, settings.max_grad_norm, plan.machine.engine, plan.model.facts)
    if plan.machine.engine.name in STAGES:
        return ZeroEngine(accelerator, settings.max_grad_norm, plan.machine.engine)
    return ReplicatedEngine(accelerator, settings.max_grad_norm)

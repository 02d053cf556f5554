"""What a run makes before its first step: processes, encodings, model, optimizer."""

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import nn

from diffsynth_core.checkpoints.run_folder import read_record
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.registry import load_family
from diffsynth_core.optimizers.averaging import AveragedOptimizer
from diffsynth_core.optimizers.per_parameter import WHOLE, PerParameterOptimizer
from diffsynth_core.optimizers.stochastic_rounding import RoundedOptimizer
from diffsynth_core.planning.data.encodings import with_encodings
from diffsynth_core.planning.machine.engines import SHARDING_VARIABLES
from diffsynth_core.planning.memory.block_swap import trained_blocks
from diffsynth_core.planning.memory.sizes import check_compilations
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import Reporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.encode import fill_cache
from diffsynth_core.training.engines import make_engine
from diffsynth_core.training.engines.engine import Engine
from diffsynth_core.training.model import TrainingModule, build_training_module

MakeEngine = Callable[[RunPlan, Accelerator], Engine]
"""Creates the engine of a run."""
PROCESS_TIMEOUT = timedelta(hours=6)
"""How long processes wait for each other: one of them may be writing hundreds of gigabytes."""


def load_for_steps(
    plan: RunPlan,
    accelerator: Accelerator,
    reporter: Reporter,
    stop: StopRequest,
    open_engine: MakeEngine = make_engine,
) -> tuple[RunPlan, TrainingModule, Engine]:
    """Fill the cache and load what a step needs; return it with the plan that knows the encodings."""
    plan = fill_encodings(plan, accelerator, reporter, stop)
    return plan, *load_model(plan, accelerator, reporter, stop, open_engine)


def fill_encodings(plan: RunPlan, accelerator: Accelerator, reporter: Reporter, stop: StopRequest) -> RunPlan:
    """Fill the cache, and return the plan that knows the encodings."""
    check_compilations(plan)
    plan = with_encodings(plan, reporter)
    _check_identities(plan)
    fill_cache(plan, load_family(plan.model.facts.name), accelerator, reporter, stop)
    stop.raise_if_set()
    return plan


def load_model(
    plan: RunPlan,
    accelerator: Accelerator,
    reporter: Reporter,
    stop: StopRequest,
    open_engine: MakeEngine = make_engine,
) -> tuple[TrainingModule, Engine]:
    """Load what a step needs, through the engine that carries out the steps."""
    engine, family = open_engine(plan, accelerator), load_family(plan.model.facts.name)
    model = build_training_module(plan, family, accelerator.device, reporter, engine.place, engine.whole)
    stop.raise_if_set()
    return model, engine


def make_accelerator(plan: RunPlan) -> Accelerator:
    """Create the accelerator for devices and processes.

    It accumulates no gradients: the loop counts steps itself.
    """
    # Engines that shard are ours: accelerate makes the process group, and would set up its own at these variables.
    for name in SHARDING_VARIABLES:
        os.environ.pop(name, None)
    # accelerate keeps one state per process and refuses another precision, which the next stage may ask for. Private,
    # but nothing public forgets the state: `tests/unit/test_private_names.py`.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=plan.machine.mixed_precision,
        cpu=plan.machine.device == "cpu",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
    )
    if accelerator.num_processes == 1 and plan.machine.device.partition(":")[2]:
        torch.accelerator.set_device_index(int(plan.machine.device.partition(":")[2]))
        accelerator.state.device = torch.device(plan.machine.device)
    return accelerator


def make_optimizer(
    plan: RunPlan, trained: Mapping[str, nn.Parameter], starts: Mapping[str, int] = WHOLE
) -> torch.optim.Optimizer:
    """Create the optimizer of a run for parameters by name, or for parts of them; see `MakeOptimizer`."""
    make, settings = partial(_make_whole, plan), plan.parameters
    if not (settings.fused_backward or settings.enable_optimizer_cpu_offload):
        return make(trained, starts)
    blocks = trained_blocks(plan.model, plan.training, settings.blocks_to_swap)
    waiting = tuple(f"{plan.model.facts.denoiser}.{block}." for block in blocks)
    on_host = [name for name in trained if settings.enable_optimizer_cpu_offload or name.startswith(waiting)]
    return PerParameterOptimizer(make, trained, torch.device(plan.machine.device), on_host)


def _make_whole(
    plan: RunPlan, trained: Mapping[str, nn.Parameter], starts: Mapping[str, int] = WHOLE
) -> torch.optim.Optimizer:
    """Create an optimizer that updates all parameters in its step."""
    choice = plan.training.optimizer
    build = partial(choice.build, plan.parameters.learning_rate)
    in_float32 = all(weight.dtype == torch.float32 for weight in trained.values())
    optimizer = (
        build(trained.values())
        if in_float32 or plan.machine.engine.spec.updates_copies
        else RoundedOptimizer(build, trained, plan.parameters.seed, starts)
    )
    return AveragedOptimizer(optimizer, choice.ema_decay) if choice.ema_decay else optimizer


def _check_identities(plan: RunPlan) -> None:
    """Check that a resumed run uses the weights it was started with."""
    record = read_record(plan.parameters.output_path)
    if record is None:
        return
    changed = [
        name
        for name, files in plan.encodings.identities.items()
        if sorted(files.values()) != sorted(record.components.get(name, {}).values())
    ]
    if changed:
        raise DiffSynthError(
            f"the files of {', '.join(changed)} changed since the run in `{plan.parameters.output_path}` started",
            "resume with the same files, or start a new run",
        )

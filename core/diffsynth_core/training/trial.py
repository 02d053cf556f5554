"""The trial before the first step: the largest micro-batch of a run, forward and backward.

What does not fit in memory then fails at once, and not hours later, when the steps first draw that micro-batch; and a
model that predicts no better than zero is told before it is trained.
"""

from itertools import islice

import torch
from torch import Tensor

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.planning.memory.estimate import count_parameters, state_on_device, training_memory
from diffsynth_core.planning.memory.fitting import alternatives
from diffsynth_core.planning.memory.memory_config import memory_config
from diffsynth_core.planning.memory.sizes import find_workload, sizes_of_sample
from diffsynth_core.planning.model.loading import free_device_memory
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import Reporter, format_memory, pluralize
from diffsynth_core.training.engines.engine import Engine
from diffsynth_core.training.loader import MicroBatch, load_largest_micro_batch
from diffsynth_core.training.model import TrainingModule

FULL_HOST_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""In the RuntimeError of PyTorch's allocator of host memory (c10/core/impl/alloc_cpu.cpp)."""
FIT = "or `--fit` with a `--gpu_memory` below what was not enough, which finds all that it takes"
LEAST_TRAINED = 10**6
"""Parameters of a denoiser; a smaller one, to try out how a run works, is not expected to draw anything."""
NAMED_CHANGES = 4
NAMED_SAMPLES = 4


def try_largest(plan: RunPlan, model: TrainingModule, engine: Engine, device: torch.device, reporter: Reporter) -> None:
    """Try out the largest micro-batch of the plan's steps, if there are any. All processes call this together.

    Args:
        model: the module that the engine trains.
        device: of this process.

    Raises:
        DiffSynthError: if any process has not enough memory for it.
    """
    if plan.output.start.first_step == plan.data.steps.total_steps:
        return
    micro_batch = load_largest_micro_batch(plan)
    losses = None
    try:
        losses = engine.try_out(micro_batch, _state_to_come(plan, micro_batch))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside of the block, where the traceback no longer keeps the tensors of the passes.
    failed = losses is None
    if not _communicates_in_passes(plan):
        failed = engine.sum_over_processes(torch.tensor([float(failed)], device=device)).item() > 0
    if failed or losses is None:
        free_device_memory(device)
        raise _does_not_fit(plan, micro_batch, device)
    is_new = not plan.output.start.first_step and not plan.parameters.rehearse
    if is_new and count_parameters(plan, plan.model.facts.denoiser) >= LEAST_TRAINED:
        _check_base(model, micro_batch, losses, reporter)


def _communicates_in_passes(plan: RunPlan) -> bool:
    """Return whether processes need each other within a pass: those that wait there are ended by the launcher when one
    of them fails.
    """
    return plan.machine.engine.spec.shards_weights or plan.machine.context_parallel > 1


def _check_base(model: TrainingModule, micro_batch: MicroBatch, losses: Tensor, reporter: Reporter) -> None:
    """Warn if the untrained loss is not below that of predicting zero, which any model does better that was trained on
    such latents.
    """
    of_zero = model.losses_of_zero(micro_batch)
    if of_zero is None:
        return
    ours, zero = (float(each.mean()) for each in (losses, of_zero))
    if ours >= zero > 0:  # samples at the noisiest timestep have no weight
        reporter.warn(
            f"before training the loss is {ours:.3g}, not below the {zero:.3g} of predicting zero: the component files "
            "may not belong together, or the model was never trained"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there is not enough memory on the device or the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or FULL_HOST_MEMORY in str(error)


def _state_to_come(plan: RunPlan, micro_batch: MicroBatch) -> int:
    """Return the bytes of optimizer state that the first step creates on the device, as far as they are known."""
    if plan.output.start.state or plan.training.optimizer.is_class:
        return 0
    sample = plan.data.samples.samples[micro_batch.refs[0].sample]
    return state_on_device(plan, memory_config(plan, sizes_of_sample(plan, sample, text_states=0)))


def _does_not_fit(plan: RunPlan, micro_batch: MicroBatch, device: torch.device) -> DiffSynthError:
    """Return the error that names the micro-batch, what was estimated for it, and what takes less."""
    samples = [plan.data.samples.samples[ref.sample] for ref in micro_batch.refs]
    frames, height, width = samples[0].target.shape
    size = f"{width} x {height}" + (f" x {pluralize(frames, 'frame')}" if frames > 1 else "")
    named = list(dict.fromkeys(sample.name for sample in samples))
    names = ", ".join(named[:NAMED_SAMPLES]) + (", …" if named[NAMED_SAMPLES:] else "")
    config = memory_config(plan, find_workload(plan).largest)
    changes = [
        f"`{' '.join(change.flag for change in found.changes)}` (then {format_memory(found.peak)})"
        for found in islice(alternatives(plan, config), NAMED_CHANGES)
    ]
    return DiffSynthError(
        f"`{device}` has not enough memory for the largest micro-batch, tried out before step "
        f"{plan.output.start.first_step + 1}: {pluralize(len(samples), 'sample')} of {size}, {names}; "
        f"a step was estimated at {format_memory(training_memory(plan, config).total)}",
        f"pass {', '.join([*changes, FIT])}",
    )

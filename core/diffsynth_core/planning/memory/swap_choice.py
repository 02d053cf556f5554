"""The fewest blocks in host memory with which a run fits the memory of a GPU. No torch."""

from dataclasses import replace

from diffsynth_core.config.choices import SWAP_BUFFERS
from diffsynth_core.config.gpu_memory import memory_bytes
from diffsynth_core.errors import Problem
from diffsynth_core.planning.memory.block_swap import swappable_blocks
from diffsynth_core.planning.memory.estimate import device_memory
from diffsynth_core.planning.memory.memory_config import MemoryConfig, memory_config
from diffsynth_core.planning.memory.sizes import find_workload
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import format_memory


def fewest_blocks(plan: RunPlan, config: MemoryConfig, limit: int) -> int | None:
    """Return the smallest number of blocks to swap with which a run takes at most `limit` bytes; None: there is none.

    As many as are on the device at a time save nothing.
    """
    numbers = (0, *range(SWAP_BUFFERS + 1, len(swappable_blocks(plan.model, plan.training)) + 1))
    peaks = ((number, device_memory(plan, replace(config, blocks_to_swap=number)).peak) for number in numbers)
    return next((number for number, peak in peaks if peak <= limit), None)


def with_chosen_blocks(plan: RunPlan) -> RunPlan:
    """Return a plan with the number of blocks to swap in the place of `auto`: all, if none fits."""
    parameters = plan.parameters
    if parameters.blocks_to_swap != "auto" or not parameters.gpu_memory:
        return plan
    limit = memory_bytes(parameters.gpu_memory)
    config = memory_config(plan, find_workload(plan).largest)
    number = fewest_blocks(plan, config, limit)
    warnings = plan.warnings
    if number is None:
        number = len(swappable_blocks(plan.model, plan.training))
        needed = device_memory(plan, replace(config, blocks_to_swap=number)).peak
        what = f"with all blocks in host memory the run still needs {format_memory(needed)}, more than `gpu_memory`"
        warnings = (*warnings, Problem(what, "`--dry_run` lists what else saves memory"))
    chosen = parameters.model_copy(update={"blocks_to_swap": number})
    return replace(plan, parameters=chosen, blocks_chosen_for=limit, warnings=warnings)

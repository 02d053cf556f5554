"""What of a run its memory depends on. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.models.size_facts import StepSizes
from diffsynth_core.planning.plan import Machine, RunPlan


@dataclass(frozen=True)
class MemoryConfig:
    """What of a run its memory depends on, and what may be chosen otherwise.

    `device`: cuda, which stands for all accelerators, or cpu.
    `rank`: that of the LoRA. `storage`: component -> its weight store (models/weight_store.py).
    """

    device: str
    precision: str
    rank: int
    recompute: bool
    offload: bool
    storage: Mapping[str, str]
    sizes: StepSizes


def device_and_precision(parameters: Parameters, machine: Machine) -> tuple[str, str]:
    """What a command is estimated for: the CPU where that is asked for; else an accelerator, whatever this machine has,
    in bf16 unless `mixed_precision` is given."""
    if parameters.device and parameters.device.partition(":")[0] == "cpu":
        return "cpu", machine.mixed_precision
    return "cuda", parameters.mixed_precision or "bf16"


def memory_config(plan: RunPlan, sizes: StepSizes) -> MemoryConfig:
    """What a plan says."""
    parameters = plan.parameters
    device, precision = device_and_precision(parameters, plan.machine)
    offload = parameters.use_gradient_checkpointing_offload
    storage = {name: files.storage for name, files in plan.model.components.items()}
    recompute = parameters.use_gradient_checkpointing or offload
    return MemoryConfig(device, precision, parameters.lora_rank, recompute, offload, storage, sizes)

"""What of a run its memory depends on. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from diffsynth_core.config.choices import Checkpointing, TrainedDtype
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.models.size_facts import StepSizes
from diffsynth_core.planning.plan import Machine, RunPlan
from diffsynth_core.planning.training.optimizer_choice import OptimizerChoice
from diffsynth_core.planning.training.recomputation import recomputes
from diffsynth_core.planning.training.targets import Training


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What of a run its memory depends on, and what may be chosen otherwise.

    Attributes:
        device: cuda, which stands for all accelerators, or cpu.
        rank: of the LoRA.
        recompute, offload: of activations (gradient checkpointing), and whether the inputs of blocks wait on the host.
        checkpointing: what is recomputed of the denoiser's blocks, if activations are.
        storage: component -> its weight store (models/weight_store.py).
        trained_dtype: of weights that train in full.
        fused_backward: each weight is updated as soon as its gradient is there, and the gradient freed.
        blocks_to_swap: blocks of the denoiser that wait on the host.
        optimizer_on_host: whether the optimizer's state is kept there.
    """

    device: str
    precision: str
    rank: int
    recompute: bool
    offload: bool
    storage: Mapping[str, str]
    sizes: StepSizes
    optimizer: OptimizerChoice
    checkpointing: Checkpointing = "full"
    trained_dtype: TrainedDtype = "float32"
    fused_backward: bool = False
    blocks_to_swap: int = 0
    optimizer_on_host: bool = False

    def training(self, plan: RunPlan) -> Training:
        """What a plan trains, with this optimizer and this dtype."""
        return replace(plan.training, optimizer=self.optimizer, dtype=self.trained_dtype)


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
    return MemoryConfig(
        device=device,
        precision=precision,
        rank=parameters.lora_rank,
        recompute=recomputes(parameters),
        offload=parameters.use_gradient_checkpointing_offload,
        checkpointing=parameters.checkpointing or "full",
        storage={name: files.storage for name, files in plan.model.components.items()},
        sizes=sizes,
        optimizer=plan.training.optimizer,
        trained_dtype=plan.training.dtype,
        fused_backward=parameters.fused_backward,
        optimizer_on_host=parameters.enable_optimizer_cpu_offload,
        blocks_to_swap=parameters.blocks_to_swap if isinstance(parameters.blocks_to_swap, int) else 0,
    )

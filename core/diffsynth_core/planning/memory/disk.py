"""How much disk a run takes, and how long a save is assumed to take: from sizes alone. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from diffsynth_core.models.bases import part_of
from diffsynth_core.models.encoded_sizes import EncodedSize
from diffsynth_core.models.size_facts import BYTES
from diffsynth_core.models.weight_store import find_store
from diffsynth_core.planning.memory.estimate import Planned, bytes_in_layers
from diffsynth_core.planning.memory.memory_config import MemoryConfig
from diffsynth_core.planning.memory.trained_sizes import lora_numbers, trained_shapes, trained_tensor_bytes
from diffsynth_core.planning.output.saves import count_checkpoints, count_states
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.weights.base_files import FLOAT8

ASSUMED_WRITE_RATE = 100e6
"""Bytes per second at which a save is assumed to be copied, hashed and written before one was measured: that of network
disks, which rented machines often have; local ones are several times faster."""
ASSUMED_SAVE_OVERHEAD = 0.5
"""Seconds that a checkpoint and a state, however small, are assumed to take besides."""


@dataclass(frozen=True)
class SaveSeconds:
    """How long one checkpoint and one state are assumed to take, before any was measured."""

    checkpoint: float
    state: float


@dataclass(frozen=True)
class DiskUse:
    """Bytes that a run writes: encodings, each checkpoint and how many there are, and the states that resume needs.

    `state` is that of one step; `states` are on disk at most, with the one being written. `packed`: weights of
    components as their store keeps them, for the next start.
    """

    cache: int
    checkpoint: int
    checkpoints: int
    state: int
    states: int
    packed: Mapping[str, int]

    @property
    def written(self) -> int:
        """Of all checkpoints, at least one, and the states."""
        return self.checkpoint * max(1, self.checkpoints) + self.states * self.state


def disk_use(plan: RunPlan, config: MemoryConfig, encoded: EncodedSize) -> DiskUse:
    """Bytes that a run writes, of all samples what is `encoded`."""
    cache = 0 if plan.data.encoded else encoded.bytes_in(config.precision)
    states = most_states(plan, plan.parameters.keep_states)
    return DiskUse(cache, checkpoint_bytes(plan), most_checkpoints(plan), state_bytes(plan), states, packed_bytes(plan))


def packed_bytes(plan: RunPlan) -> dict[str, int]:
    """Bytes of the packed weights of each component of which some are kept for the next start: those that its store
    packs smaller than they are in its files, unless a preset LoRA is merged into them first.
    """
    kept, fused = {}, plan.model.fused_lora
    for name, files in plan.model.components.items():
        shapes, each = plan.model.shapes.get(name), find_store(files.storage).bytes_per_weight
        if shapes and each and each < _bytes_per_number(plan, name) and not (fused and fused.component == name):
            kept[name] = sum(bytes_in_layers(plan, name, files.storage).values())
    return kept


def state_bytes(plan: RunPlan) -> int:
    """Of the state after one step: trained weights, in the dtype in which they are updated, and the state of the
    optimizer.
    """
    if not plan.task.trains:
        return 0
    rank = plan.parameters.lora_rank
    updated = "float32" if plan.machine.engine.spec.updates_copies else plan.training.dtype
    weights = trained_tensor_bytes(plan, rank, updated)
    return sum(weights) + plan.training.optimizer.state_bytes(trained_shapes(plan, rank))


def assumed_save_seconds(plan: RunPlan) -> SaveSeconds:
    """From the bytes of a checkpoint and of a state."""
    checkpoint, state = checkpoint_bytes(plan) / ASSUMED_WRITE_RATE, state_bytes(plan) / ASSUMED_WRITE_RATE
    return SaveSeconds(ASSUMED_SAVE_OVERHEAD + checkpoint, ASSUMED_SAVE_OVERHEAD + state)


def most_checkpoints(plan: RunPlan) -> int:
    """How many checkpoints are on disk at most: the next is whole before the oldest is deleted, and one that a mirror
    copies stays until then.
    """
    count, settings = count_checkpoints(plan), plan.parameters
    if settings.keep_checkpoints is None:
        return count
    return min(count, settings.keep_checkpoints + 1 + settings.keep_best + bool(settings.mirror))


def most_states(plan: RunPlan, keep: int) -> int:
    """How many states are on disk at most when `keep` are kept: the next is whole before the oldest is removed, and one
    that a mirror copies stays until then.
    """
    most = keep + 1 + bool(plan.parameters.mirror)
    return min(most, count_states(plan)) if plan.data.steps.total_steps else most


def checkpoint_bytes(plan: RunPlan) -> int:
    """Of one checkpoint: LoRA in float32, full weights as in the base file, both otherwise with `save_dtype`; twice
    that if the run saves averages of the weights too."""
    save = plan.parameters.save_dtype
    total = lora_numbers(plan, plan.parameters.lora_rank) * BYTES[save or "float32"]
    for name in plan.training.components & plan.model.shapes.keys():
        written = plan.training.weights(name, plan.model.components[name].layout, plan.model.shapes[name])
        numbers = sum(math.prod(plan.model.shapes[name][weight]) for weight in written)
        total += round(numbers * (BYTES[save] if save else stored_bytes(plan, name))) if numbers else 0
    return 2 * total if plan.training.optimizer.ema_decay else total


def _bytes_per_number(plan: RunPlan, component: str) -> float:
    """Bytes of a number in the files of a component, on average."""
    return file_bytes(plan, component) / sum(map(math.prod, plan.model.shapes[component].values()))


def stored_bytes(plan: RunPlan, component: str) -> float:
    """Bytes of a number in a full checkpoint of a component, which is written as its files are, on average; for
    8-bit floats bfloat16 is written."""
    if component in plan.model.published:
        return BYTES[plan.model.published[component].dtype]
    tensors = part_of(plan.model.components[component]).tensors.values()
    written = sum(tensor.nbytes * (2 if tensor.dtype in FLOAT8 else 1) for tensor in tensors)
    return written / sum(math.prod(tensor.shape) for tensor in tensors)


def file_bytes(plan: Planned, component: str) -> int:
    """Of a component in files, those that are there or those that are published."""
    if component in plan.model.published:
        published = plan.model.published[component]
        return published.parameters * BYTES[published.dtype]
    return part_of(plan.model.components[component]).nbytes


def has_scales(plan: RunPlan, component: str) -> bool:
    """Whether a component's files store weights in 8-bit floats with scales."""
    return component not in plan.model.published and bool(part_of(plan.model.components[component]).scales)


def download_bytes(plan: Planned) -> int:
    """Of the components whose files are not there, as they are published."""
    return sum(file_bytes(plan, name) for name in plan.model.published)

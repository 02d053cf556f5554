"""The tensors that a run trains: their shapes, and in which dtype. No torch."""

import math
from typing import NamedTuple

from diffsynth_core.config.choices import TrainedDtype
from diffsynth_core.models.block_swap import block_of
from diffsynth_core.models.size_facts import BYTES
from diffsynth_core.planning.memory.activations import trainable_weights
from diffsynth_core.planning.memory.remembered import remembered
from diffsynth_core.planning.plan import RunPlan


@remembered
def lora_shapes(plan: RunPlan, rank: int) -> list[tuple[int, ...]]:
    """Shapes of the LoRA's tensors: A of each public module once, B of each of its parts."""
    component = plan.training.lora_component
    if not component:
        return []
    public_keys, shapes = plan.model.components[component].layout.public_keys, plan.model.shapes.get(component, {})
    found: list[tuple[int, ...]] = []
    for module in plan.training.lora_modules:
        parts = [shapes[f"{name}.weight"] for name in public_keys.to_targets(module) or ()]
        found.append((rank, *parts[0][1:]))
        found += [(part[0], rank, *(1 for _ in part[2:])) for part in parts]
    return found


def lora_numbers(plan: RunPlan, rank: int) -> int:
    """Numbers in the LoRA."""
    return sum(map(math.prod, lora_shapes(plan, rank)))


def trained_shapes(plan: RunPlan, rank: int) -> list[tuple[int, ...]]:
    """Shapes of all tensors that take gradients, with a LoRA of this rank."""
    return lora_shapes(plan, rank) + [weight.shape for weight in full_weights(plan)]


def float32_shapes(plan: RunPlan, rank: int, dtype: TrainedDtype) -> list[tuple[int, ...]]:
    """Shapes of those that train in float32, where weights train in `dtype`."""
    whole = [weight.shape for weight in full_weights(plan) if dtype == "float32" or weight.stays_float32]
    return lora_shapes(plan, rank) + whole


def rounded_shapes(plan: RunPlan, dtype: TrainedDtype) -> list[tuple[int, ...]]:
    """Shapes of those that train in bfloat16, where weights train in `dtype`."""
    return [weight.shape for weight in full_weights(plan) if dtype == "bf16" and not weight.stays_float32]


class FullWeight(NamedTuple):
    """A tensor that trains without LoRA.

    Attributes:
        block: block of the denoiser that it stands in, if any.
        stays_float32: whatever the others train in.
    """

    shape: tuple[int, ...]
    block: str | None
    stays_float32: bool


def trainable_shapes(plan: RunPlan, component: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a component's weights that train without LoRA, by module key."""
    shapes = plan.model.shapes.get(component)
    return {name: shapes[name] for name in trainable_weights(plan, component, shapes)} if shapes else {}


@remembered
def full_weights(plan: RunPlan) -> list[FullWeight]:
    """Return the tensors that train without LoRA."""
    found = []
    for part in plan.model.shapes:
        facts, of_denoiser = plan.model.facts.component(part), part == plan.model.facts.denoiser
        for name, shape in trainable_shapes(plan, part).items():
            block = block_of(name, facts) if of_denoiser else None
            found.append(FullWeight(shape, block, facts.stays_float32(name)))
    return found


def trained_tensor_bytes(plan: RunPlan, rank: int, dtype: TrainedDtype) -> list[int]:
    """Bytes of each tensor that trains, where weights train in `dtype`; its gradient takes as much."""
    sizes = {"float32": float32_shapes(plan, rank, dtype), "bfloat16": rounded_shapes(plan, dtype)}
    return [math.prod(shape) * BYTES[kept] for kept, shapes in sizes.items() for shape in shapes]


def count_trained(plan: RunPlan) -> int:
    """Numbers that take gradients."""
    return sum(map(math.prod, trained_shapes(plan, plan.parameters.lora_rank)))

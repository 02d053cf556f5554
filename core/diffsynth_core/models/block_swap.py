"""Which blocks of a component wait in host memory, and in which pieces they are copied. No torch."""

import math
from collections.abc import Collection, Sequence

from diffsynth_core.models.shapes import count_blocks, layers_of_blocks
from diffsynth_core.models.spec import ComponentFacts, Shapes

SPLIT_NUMBERS = 2**20
"""Numbers in one unit of `cpu_offload_split_threshold`, as in DiffSynth-Studio."""


def frozen_blocks(facts: ComponentFacts, shapes: Shapes, trained: Collection[str]) -> tuple[str, ...]:
    """Return the names of the blocks whose linear layers are all frozen, in the order of the forward pass.

    Args:
        trained: module keys of weights that train without LoRA.
    """
    changing = {block_of(name, facts) for name in trained}
    blocks = [f"{name}.{index}" for name in facts.blocks for index in range(count_blocks(shapes, f"{name}."))]
    return tuple(block for block in blocks if block not in changing)


def choose_blocks(blocks: Sequence[str], number: int) -> tuple[str, ...]:
    """Return this many blocks, spread evenly, so that several that stay on the device compute while one is copied."""
    return tuple(blocks[(2 * index + 1) * len(blocks) // (2 * number)] for index in range(number))


def swap_units(
    facts: ComponentFacts, shapes: Shapes, blocks: Sequence[str], split: float | None
) -> tuple[tuple[str, ...], ...]:
    """Return the linear layers of blocks, by module key, in the groups that are copied together.

    Args:
        split: blocks with more numbers than this many times `SPLIT_NUMBERS` are split into their parts; None: none are.
    """
    layers = [layer for layer in layers_of_blocks(shapes) if not facts.stays_float32(f"{layer}.weight")]
    limit = math.inf if split is None else split * SPLIT_NUMBERS
    units: list[tuple[str, ...]] = []
    for block in blocks:
        units += _split(block, [layer for layer in layers if layer.startswith(f"{block}.")], shapes, limit)
    return tuple(units)


def _split(prefix: str, layers: Sequence[str], shapes: Shapes, limit: float) -> list[tuple[str, ...]]:
    """Return layers below a module as one group, or as those of its parts if they have too many numbers."""
    numbers = sum(math.prod(shapes[f"{layer}.weight"]) for layer in layers)
    if len(layers) <= 1 or numbers <= limit:
        return [tuple(layers)] if layers else []
    parts = dict.fromkeys(f"{prefix}.{layer.removeprefix(f'{prefix}.').partition('.')[0]}" for layer in layers)
    return [
        group
        for part in parts
        for group in _split(part, [one for one in layers if f"{one}.".startswith(f"{part}.")], shapes, limit)
    ]


def block_of(name: str, facts: ComponentFacts) -> str | None:
    """Return the block that a weight stands in."""
    for blocks in facts.blocks:
        if name.startswith(f"{blocks}."):
            return f"{blocks}.{name.removeprefix(f'{blocks}.').partition('.')[0]}"
    return None

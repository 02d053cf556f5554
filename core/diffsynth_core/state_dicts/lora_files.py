"""LoRA files against the base they are for, by headers alone. No torch."""

from collections.abc import Collection, Mapping
from pathlib import Path

from diffsynth_core.errors import DiffSynthError, shorten
from diffsynth_core.state_dicts.headers import read_header
from diffsynth_core.state_dicts.lora_names import DIT, LoraNaming, find_lora_keys


def check_lora_file(
    path: Path, module_shapes: Mapping[str, tuple[int, ...]], naming: LoraNaming = DIT, besides: Collection[str] = ()
) -> dict[str, int]:
    """Prove that every key of a LoRA file finds a module of a fitting shape; headers only.

    Args:
        module_shapes: weight shape of each module of the base component, by its documented name.
        besides: keys of the file that are no LoRA.

    Returns: rank by module.

    Raises:
        DiffSynthError: when a key finds no module, a half is missing, or a shape does not fit.
    """
    tensors = {name: tensor for name, tensor in read_header(path).tensors.items() if name not in besides}
    _, found, unmatched = find_lora_keys(tensors, module_shapes, naming)
    if unmatched:
        raise DiffSynthError(
            f"`{path}`: {len(unmatched)} of {len(tensors)} keys fit no module: {shorten(sorted(unmatched))}",
            "name a LoRA of this model",
        )
    ranks = {}
    for module, keys in found.items():
        if not keys.down or not keys.up:
            raise DiffSynthError(f"`{path}`: the LoRA of `{module}` lacks a half", "write the file anew")
        down, up, base = tensors[keys.down].shape, tensors[keys.up].shape, module_shapes[module]
        rank = down[0] if down else 0
        if down != (rank, *base[1:]) or up != (base[0], rank, *[1] * len(base[2:])):
            raise DiffSynthError(
                f"`{path}`: the LoRA of `{module}` is {list(up)} x {list(down)}, which does not fit its weight {list(base)}",
                "name a LoRA of this model",
            )
        ranks[module] = down[0]
    return ranks

"""Layers of a component by kind: linear layers of repeated blocks, and layers that can have a LoRA."""

from collections.abc import Collection, Iterator

from torch import nn

from diffsynth_core.models.family import Family
from diffsynth_core.models.loading import build_empty, shape_problems
from diffsynth_core.models.spec import ComponentFiles

PLAIN_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Convolutions that can have a LoRA."""


def find_linear_layers_of_blocks(family: Family, files: ComponentFiles) -> frozenset[str] | None:
    """Return the module keys of the linear layers in a component's repeated blocks; None if its files are faulty."""
    if shape_problems(family, files):
        return None
    return linear_layers_of_blocks(build_empty(family, files))


def kinds_without_lora(family: Family, files: ComponentFiles, names: Collection[str]) -> dict[str, str]:
    """Return those of the modules, by module key, that cannot have a LoRA, with their classes.

    Empty if the files are faulty, which is reported elsewhere. A subclass of a convolution pads or caches in its own
    way, which the plain convolutions of a LoRA do not.
    """
    if shape_problems(family, files):
        return {}
    modules = dict(build_empty(family, files).named_modules())
    return {
        name: type(modules[name]).__name__
        for name in names
        if name in modules
        and not isinstance(modules[name], nn.Linear)
        and type(modules[name]) not in PLAIN_CONVOLUTIONS
    }


def linear_layers_of_blocks(module: nn.Module) -> frozenset[str]:
    """Return the linear layers in repeated blocks: in a list of at least two modules of one class."""
    return frozenset(
        f"{block}.{name}"
        for block, blocks in _lists_of_blocks(module)
        for name, layer in blocks.named_modules()
        if isinstance(layer, nn.Linear)
    )


def _lists_of_blocks(module: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(block) for block in child}) == 1:
            yield name, child

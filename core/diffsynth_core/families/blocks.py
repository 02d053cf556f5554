"""The linear layers that make up most of a component: those of its repeated blocks."""

from collections.abc import Iterator

from torch import nn

from diffsynth_core.families.family import Family
from diffsynth_core.families.interface import ComponentFiles
from diffsynth_core.families.loading import build_empty, shape_problems


def find_linear_layers_of_blocks(family: Family, files: ComponentFiles) -> frozenset[str] | None:
    """Names, in our module, of the linear layers of a component's repeated blocks; None when its files are faulty."""
    if shape_problems(family, files):
        return None
    return linear_layers_of_blocks(build_empty(family, files))


def linear_layers_of_blocks(module: nn.Module) -> frozenset[str]:
    """Names of the linear layers below repeated blocks: below a list of at least two modules of one class."""
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

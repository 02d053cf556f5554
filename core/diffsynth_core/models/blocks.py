"""The layers of a component by their kind: the linear ones of its repeated blocks, and those that can carry a LoRA."""

from collections.abc import Collection, Iterator

from torch import nn

from diffsynth_core.models.family import Family
from diffsynth_core.models.loading import build_empty, shape_problems
from diffsynth_core.models.spec import ComponentFiles

PLAIN_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def find_linear_layers_of_blocks(family: Family, files: ComponentFiles) -> frozenset[str] | None:
    """Names, in our module, of the linear layers of a component's repeated blocks; None when its files are faulty."""
    if shape_problems(family, files):
        return None
    return linear_layers_of_blocks(build_empty(family, files))


def kinds_without_lora(family: Family, files: ComponentFiles, names: Collection[str]) -> dict[str, str]:
    """Those of the modules, by their names in ours, that cannot carry a LoRA, and the class of each.

    Empty where the files are faulty, which is told elsewhere. A convolution of a class of its own pads or remembers
    what the plain ones, of which a LoRA is made, do not.
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

"""Compiling the repeated blocks of a denoiser."""

from collections.abc import Callable
from typing import Any

from torch import nn

from diffsynth_core.config.choices import MOST_COMPILATIONS
from diffsynth_core.models.spec import ComponentFacts


def compile_blocks(facts: ComponentFacts, module: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the blocks of a component one by one, in place: names of modules and weights stay as they are.

    Nothing is compiled before the first call. Blocks of one class that compute alike share what is compiled for a
    shape. Every shape is compiled for itself (`dynamic=False`), and beyond `MOST_COMPILATIONS` a call raises: as whole
    graphs are asked for (`fullgraph`), PyTorch neither breaks a graph nor goes on without compiling.

    Args:
        backend: of `torch.compile`.
    """
    for blocks in facts.blocks:
        for block in module.get_submodule(blocks).children():
            block.compile(backend=backend, fullgraph=True, dynamic=False, recompile_limit=MOST_COMPILATIONS)

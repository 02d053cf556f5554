"""Gradient checkpointing inside of blocks; that of whole blocks is switched on by the libraries of their models."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten  # no public module has them
from torch.utils.checkpoint import checkpoint

from diffsynth_core.models.spec import ComponentFacts


def blocks_of(module: nn.Module, facts: ComponentFacts) -> Iterator[nn.Module]:
    """Yield the repeated blocks of a component, in the order of the forward pass."""
    for name in facts.blocks:
        yield from module.get_submodule(name).children()


def parts_of(block: nn.Module) -> list[nn.Module]:
    """Return the parts of a block that have layers of their own, such as attention and feed-forward.

    A single layer is none, with a LoRA or without: of it no more is kept than its input.
    """
    return [part for part in block.children() if any(part.children()) and not hasattr(part, "base_layer")]


def checkpoint_parts(block: nn.Module) -> None:
    """Have the backward pass recompute each part of a block from its inputs, in place."""
    for part in parts_of(block):
        part.forward = partial(_checkpointed, part.forward)


def _checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function, and repeat it in the backward pass.

    Of nested checkpoints the outer one keeps only what is passed by position: anything else, such as a tensor in a
    keyword or in a tuple, would be kept from the forward pass on.
    """
    leaves, structure = tree_flatten((args, kwargs))

    def call(*leaves: Any) -> Any:
        args, kwargs = tree_unflatten(leaves, structure)
        return function(*args, **kwargs)

    return checkpoint(call, *leaves, use_reentrant=False)

"""Gradient checkpointing of the blocks of a denoiser, and inside of them."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten  # no public module has them
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from diffsynth_core.config.choices import Recomputation
from diffsynth_core.models.spec import ComponentFacts

ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)
"""The fused kernels of scaled dot-product attention. They return all that their backward pass needs beside their
inputs. Their names begin with an underscore, and no public function names them."""


def blocks_of(module: nn.Module, facts: ComponentFacts) -> Iterator[nn.Module]:
    """Yield the repeated blocks of a component, in the order of the forward pass."""
    for name in facts.blocks:
        yield from module.get_submodule(name).children()


def block_caller(blocks: Sequence[nn.Module], recomputation: Recomputation) -> Callable[..., Any] | None:
    """Return what calls a block, (block, inputs) -> outputs, and repeats it in the backward pass as far as that is
    wanted; None: what the libraries of the models have for that, which keep inputs alone.

    Args:
        blocks: in the order of the forward pass.
    """
    if not recomputation.keeps_more:
        return None
    every = recomputation.keeps_every
    kept = frozenset(blocks[every - 1 :: every] if every else ())
    contexts = partial(create_selective_checkpoint_contexts, list(ATTENTION) if recomputation.keeps_attention else [])

    def call(block: nn.Module, *inputs: Any) -> Any:
        if block in kept:
            return block(*inputs)
        return checkpoint(block.__call__, *inputs, use_reentrant=False, context_fn=contexts)

    return call


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

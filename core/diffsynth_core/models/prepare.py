"""Making a component ready to train: which of its weights take gradients, its LoRA, recomputed activations."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from diffsynth_core.adapters.lora import add_lora
from diffsynth_core.config.choices import RECOMPUTATIONS, AttentionName, Checkpointing
from diffsynth_core.models.attention import set_attention
from diffsynth_core.models.checkpointing import block_caller, blocks_of, checkpoint_parts
from diffsynth_core.models.family import Family
from diffsynth_core.weights.key_maps import SAME_NAMES, KeyMap


@dataclass(frozen=True)
class ComponentSetup:
    """How a component takes part in a training step.

    `trained`: names of parameters that take gradients, without LoRA.
    `lora_modules`: public names of the modules that carry a LoRA of this `rank`, or of the rank of each.
    `public_keys`: public names -> names in the module. `seed`: of the LoRA's initial weights.
    `checkpointing`: what of its blocks the backward pass recomputes (gradient checkpointing); None: nothing.
    `swapped`: linear layers whose weights wait in host memory, in the groups that are copied together.
    `attention`: the kernel of its attention.
    """

    trained: frozenset[str] = frozenset()
    lora_modules: tuple[str, ...] = ()
    public_keys: KeyMap = SAME_NAMES
    rank: int | Mapping[str, int] = 0
    seed: int = 0
    checkpointing: Checkpointing | None = None
    swapped: tuple[tuple[str, ...], ...] = ()
    attention: AttentionName = "auto"


FROZEN = ComponentSetup()
"""Of a component that takes no gradients."""


def prepare_component(family: Family, component: str, module: nn.Module, setup: ComponentSetup) -> None:
    """Prepare a component for training steps, in place.

    The weights may be loaded or on the meta device; layers of a weight store are in place already (models/loading.py).

    Raises:
        DiffSynthError: as `add_lora`.
    """
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in setup.trained)
    if setup.lora_modules:
        add_lora(module, setup.lora_modules, setup.rank, setup.seed, setup.public_keys)
    set_attention(module, setup.attention)
    if setup.checkpointing:
        recomputation = RECOMPUTATIONS[setup.checkpointing]
        blocks = list(blocks_of(module, family.facts.component(component)))
        family.checkpoint_gradients(component, module, block_caller(blocks, recomputation))
        if recomputation.parts:
            for block in blocks:
                checkpoint_parts(block)

"""Floating-point operations of a training step, by formula from shapes. No torch.

Matrix products alone count, a multiplication and an addition each as one operation:

- a linear layer of P weights that T tokens meet: 2 P T forward, 2 P T for the gradient of its input, 2 P T for that of
  its weight if it trains; with a LoRA, A and B are two more such layers that train
- an attention of Q to K tokens over all heads, H numbers wide together: 4 Q K H forward, 10 Q K H backward, where
  FlashAttention-2 computes the scores again (https://arxiv.org/abs/2307.08691, section 4.1 counts likewise)
- gradient checkpointing: the forward pass of each block once more; where parts of blocks are recomputed on their own,
  that of parts twice more, in full training a little less, because the last layer of a part is not needed again

The backward pass reaches back to the first block with trained weights.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from diffsynth_core.config.choices import RECOMPUTATIONS, Recomputation
from diffsynth_core.models.block_swap import block_of
from diffsynth_core.models.forward_work import Tokens
from diffsynth_core.models.shapes import count_blocks
from diffsynth_core.models.size_facts import StepSizes
from diffsynth_core.models.spec import ComponentFacts, Shapes, modules_with_weights
from diffsynth_core.planning.memory.activations import step_components, trainable_weights
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.planning.training.recomputation import checkpointing_of

BACKWARD_OF_ATTENTION = 2.5
"""Of its forward pass: five matrix products instead of two."""


@dataclass(frozen=True)
class StepFlops:
    """Operations of a step, by pass; `recomputed`: of forward passes that gradient checkpointing repeats."""

    forward: float = 0
    backward: float = 0
    recomputed: float = 0

    @property
    def total(self) -> float:
        """Operations of all passes."""
        return self.forward + self.backward + self.recomputed

    def __add__(self, other: "StepFlops") -> "StepFlops":
        return StepFlops(
            self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed
        )

    def __mul__(self, factor: float) -> "StepFlops":
        return StepFlops(self.forward * factor, self.backward * factor, self.recomputed * factor)


@dataclass(frozen=True)
class _Products:
    """Products of a layer or an attention in one block, or outside of all; operations of the passes of one sample.

    Attributes:
        inputs: for the gradients of what it reads.
        weights: for the gradients of what trains of it.
        in_part: whether it is in a part of the block that has layers of its own.
        is_attention: whether it is an attention.
        is_exchanged: whether processes exchange its tokens and heads, so that the backward pass computes it again.
    """

    block: str | None
    forward: float
    inputs: float
    weights: float = 0
    in_part: bool = False
    is_attention: bool = False
    is_exchanged: bool = False


def step_flops(plan: RunPlan, sizes: StepSizes) -> StepFlops | None:
    """Return the operations of a step of one process, each of whose micro-batches has these sizes.

    None if an encoder trains, whose work is not declared.
    """
    samples = plan.data.samples.samples
    predictions = max((sample.sampling.steps for sample in samples if sample.sampling), default=1)
    total = StepFlops()
    for name in step_components(plan):
        facts = plan.model.facts.component(name)
        if facts.work is None:
            return None
        products = list(_products(plan, name, facts, facts.work.tokens(plan.model.variant, sizes)))
        total += _passes(plan, name, facts, products)
    return total * (sizes.batch * plan.parameters.gradient_accumulation_steps * predictions)


def _products(plan: RunPlan, component: str, facts: ComponentFacts, tokens: Tokens) -> Iterator[_Products]:
    """Yield the products of a component's forward pass."""
    shapes, ranks = plan.model.shapes[component], _lora_ranks(plan, component)
    trained = trainable_weights(plan, component, shapes)
    assert facts.work is not None
    processes = plan.machine.context_parallel
    own = facts.work.of_process(tokens, processes)
    for layer in sorted(modules_with_weights(shapes)):
        weight = shapes[f"{layer}.weight"]
        read = next(own[kind] for pattern, kind in facts.work.layers.items() if fnmatchcase(layer, pattern))
        base = 2 * math.prod(weight) * read
        lora = 2 * ranks.get(layer, 0) * (math.prod(weight[1:]) + weight[0]) * read
        changing = lora + (base if f"{layer}.weight" in trained else 0)
        block = block_of(layer, facts)
        yield _Products(block, base + lora, base + lora, changing, _is_in_part(layer, block))
    for attention in facts.work.attentions:
        for layer in modules_with_weights(shapes):
            if fnmatchcase(layer, attention.layer):
                width = shapes[f"{layer}.weight"][0]
                # Of a part of the heads for all tokens, as much as of all heads for a part of the tokens.
                forward = 4 * own[attention.queries] * tokens[attention.keys] * width
                block = block_of(layer, facts)
                inputs = BACKWARD_OF_ATTENTION * forward
                yield _Products(
                    block,
                    forward,
                    inputs,
                    in_part=_is_in_part(layer, block),
                    is_attention=True,
                    is_exchanged=processes > 1 and attention.keys in facts.work.divided,
                )


def _is_in_part(layer: str, block: str | None) -> bool:
    return block is not None and "." in layer.removeprefix(f"{block}.")


def _passes(plan: RunPlan, component: str, facts: ComponentFacts, products: list[_Products]) -> StepFlops:
    """Return the operations of one sample in a component.

    Layers outside of blocks read what has no gradients, or are negligible: the last one makes a few channels.
    """
    order = _block_order(facts, plan.model.shapes[component])
    changing = [product.block for product in products if product.weights]
    if component == plan.model.facts.denoiser and plan.training.components & set(plan.model.variant.step_components):
        changing.append(None)  # a ControlNet adds its outputs from the first block on
    first = min((order.get(block, 0) for block in changing), default=len(order))
    reached = [product for product in products if product.block and order[product.block] >= first]
    kind = checkpointing_of(plan.parameters, component == plan.model.facts.denoiser)
    return StepFlops(
        sum(product.forward for product in products),
        sum(product.inputs for product in reached) + sum(product.weights for product in products),
        sum(
            product.forward
            * ((_repetitions(product, order, RECOMPUTATIONS[kind]) if kind else 0) + product.is_exchanged)
            for product in reached
        ),
    )


def _repetitions(product: _Products, order: Mapping[str | None, int], recomputation: Recomputation) -> int:
    """Return how often the backward pass repeats a product of a block that it reaches."""
    every = recomputation.keeps_every
    if (every and order[product.block] % every == every - 1) or (
        recomputation.keeps_attention and product.is_attention
    ):
        return 0
    return 2 if recomputation.parts and product.in_part else 1


def _block_order(facts: ComponentFacts, shapes: Shapes) -> Mapping[str | None, int]:
    """Return block -> its place in the forward pass."""
    blocks = [f"{name}.{index}" for name in facts.blocks for index in range(count_blocks(shapes, f"{name}."))]
    return {block: place for place, block in enumerate(blocks)}


def _lora_ranks(plan: RunPlan, component: str) -> dict[str, int]:
    """Return the layers of a component that carry a LoRA, and its rank."""
    if component != plan.training.lora_component:
        return {}
    public_keys, rank = plan.model.components[component].layout.public_keys, plan.parameters.lora_rank
    return {layer: rank for module in plan.training.lora_modules for layer in public_keys.to_targets(module) or ()}

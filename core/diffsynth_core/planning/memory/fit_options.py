"""What may be done otherwise for a run to take less memory, in the order of what it costs. No torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from diffsynth_core.config.choices import RECOMPUTATIONS, SWAP_BUFFERS, Checkpointing
from diffsynth_core.config.documents import flag
from diffsynth_core.config.origins import DEFAULT
from diffsynth_core.config.quant_options import QuantOption, join_quant_options, split_quant_options
from diffsynth_core.errors import collect_problems, report
from diffsynth_core.models.size_facts import MediaSize
from diffsynth_core.planning.machine.engines import exclusions
from diffsynth_core.planning.memory.block_swap import swappable_blocks, with_number_of_blocks
from diffsynth_core.planning.memory.memory_config import MemoryConfig
from diffsynth_core.planning.memory.sizes import shrink
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.planning.training.optimizer_choice import OptimizerChoice, choose_optimizer
from diffsynth_core.planning.training.updates import dtype_problems, update_problems
from diffsynth_core.progress import pluralize

Cost = Literal["time", "precision", "quality", "scope"]
"""What an option costs.

- time: nothing else: the same is computed, apart from the order of additions
- precision: weights or the optimizer's state are rounded, so little that it is rarely seen
- quality: they are rounded so much, or so much of the state is left out, that it may be seen
- scope: something else is trained: smaller batches, a LoRA of lower rank, shorter clips, smaller images
"""
FITTED = (
    "use_gradient_checkpointing",
    "use_gradient_checkpointing_offload",
    "checkpointing",
    "fused_backward",
    "blocks_to_swap",
    "enable_optimizer_cpu_offload",
    "trained_dtype",
    "optimizer",
    "optimizer_args",
    "quant_options",
)
"""Parameters of the options that leave what is trained as it is."""
CHECKPOINTING_WORDS: Mapping[Checkpointing, str] = {
    "full": "blocks recomputed in full",
    "nested": "parts of blocks recomputed once more",
}
"""Kinds of gradient checkpointing that keep the least, from the one that keeps more."""
Change = Callable[[MemoryConfig], MemoryConfig]
SHARES = (0.75, 0.5, 0.25)
"""Of the area of images, and of the length of clips, that are tried."""


@dataclass(frozen=True)
class MemoryOption:
    """Something to do otherwise.

    Attributes:
        parameters: those that it sets.
        degrees: what it makes of a config, from the least to the most.
    """

    cost: Cost
    parameters: tuple[str, ...]
    degrees: Sequence[Change]


@dataclass(frozen=True)
class ParameterChange:
    """A parameter and its new value, in words and as a recipe sets it."""

    words: str
    parameter: str
    value: Any

    @property
    def flag(self) -> str:
        """The flag that makes the change, quoted for a shell."""
        return flag(self.parameter, self.value)


@dataclass(frozen=True)
class OtherOptimizer:
    """What takes less memory than the default optimizer, and the parameters that choose it."""

    cost: Cost
    words: str
    parameters: Mapping[str, str]


@dataclass(frozen=True)
class Quantization:
    """What it costs to quantize a frozen component, and in what, in words."""

    cost: Cost
    words: str


QUANTIZATIONS = {"fp8": Quantization("precision", "8 bits"), "nf4": Quantization("quality", "4 bits")}
"""Storage, which is also the method of `quant_options` -> what it costs. `int8` takes as many bits as `fp8`."""
OTHER_OPTIMIZERS = (
    OtherOptimizer("precision", "AdamW with 8-bit state", {"optimizer": "adamw8bit"}),
    # With `eps[1]` of 1 a step is as large as the learning rate, as that of AdamW is, and not relative to the root mean
    # square of the weight (torch/optim/_adafactor.py).
    OtherOptimizer("quality", "Adafactor instead of AdamW", {"optimizer": "adafactor", "optimizer_args": "eps=none,1"}),
)


def memory_options(plan: RunPlan, config: MemoryConfig) -> list[MemoryOption]:
    """Return what may be done otherwise than a config says, in the order of what it costs."""
    updates, waiting = [*_update_options(plan, config), *_optimizer_options(plan)], [*_waiting_options(config)]
    # Where weights train in full, they and their state need host memory more than activations do.
    in_full = bool(plan.training.full or plan.training.parts)
    options = [*_recomputing_options(config), *(updates + waiting if in_full else waiting + updates)]
    options += [*_checkpointing_options(config), *_storage_options(plan, config), *_scope_options(plan, config)]
    order = ("time", "precision", "quality", "scope")
    able = [option for option in options if _goes_with_engine(plan, config, option)]
    return sorted(able, key=lambda option: order.index(option.cost))


def _goes_with_engine(plan: RunPlan, config: MemoryConfig, option: MemoryOption) -> bool:
    """Return whether the engine of a run can train with an option."""
    after = option.degrees[-1](config)
    values = {change.parameter: change.value for change in parameter_changes(plan, after, config)}
    changed = plan.parameters.model_copy(update=values)
    return not list(exclusions(changed, after.optimizer, config.precision, plan.machine.engine))


def _recomputing_options(config: MemoryConfig) -> Iterator[MemoryOption]:
    if not config.recompute:
        recomputed = partial(replace, recompute=True)
        yield MemoryOption("time", ("use_gradient_checkpointing",), [recomputed])


def _waiting_options(config: MemoryConfig) -> Iterator[MemoryOption]:
    if not (config.offload or RECOMPUTATIONS[config.checkpointing].keeps_attention):
        waiting = partial(replace, recompute=True, offload=True)
        yield MemoryOption("time", ("use_gradient_checkpointing_offload", *_recomputation(config)), [waiting])


def _checkpointing_options(config: MemoryConfig) -> Iterator[MemoryOption]:
    """Yield the recomputation of whole blocks, if more is kept, and then that of parts of recomputed blocks, which
    takes the most time of what costs nothing else.
    """
    order = tuple(CHECKPOINTING_WORDS)
    now = order.index(config.checkpointing) if config.checkpointing in order else -1
    degrees = [partial(replace, recompute=True, checkpointing=kind) for kind in order[now + 1 :]]
    if degrees:
        yield MemoryOption("time", ("checkpointing", *_recomputation(config)), degrees)


def _recomputation(config: MemoryConfig) -> tuple[str, ...]:
    """Return the parameter that an option includes which recomputes activations, if it is off."""
    return () if config.recompute else ("use_gradient_checkpointing",)


def _update_options(plan: RunPlan, config: MemoryConfig) -> Iterator[MemoryOption]:
    """Yield updates in the backward pass, blocks and optimizer state in host memory, and training in bf16."""
    if _may_update(plan, config, "fused_backward"):
        yield MemoryOption("time", ("fused_backward",), [partial(replace, fused_backward=True)])
    yield from _swap_options(plan, config)
    if _may_update(plan, config, "enable_optimizer_cpu_offload"):
        yield MemoryOption("time", ("enable_optimizer_cpu_offload",), [partial(replace, optimizer_on_host=True)])
    in_float32 = config.trained_dtype == "float32" and (plan.training.full or plan.training.parts)
    rounded = plan.parameters.model_copy(update={"trained_dtype": "bf16"})
    if in_float32 and not list(dtype_problems(rounded, config.optimizer, config.precision)):
        yield MemoryOption("precision", ("trained_dtype",), [partial(replace, trained_dtype="bf16")])


def _may_update(plan: RunPlan, config: MemoryConfig, switch: str) -> bool:
    """Return whether a parameter of updates is off and may be switched on."""
    changed = plan.parameters.model_copy(update={switch: True})
    problems = update_problems(changed, config.optimizer, config.precision, plan.machine.world_size)
    return not getattr(plan.parameters, switch) and not list(problems)


def _swap_options(plan: RunPlan, config: MemoryConfig) -> Iterator[MemoryOption]:
    """Yield blocks in host memory, with what blocks that train need besides. As many as are on the device at a time
    save nothing."""
    number = len(swappable_blocks(plan.model, plan.training))
    if number <= max(SWAP_BUFFERS, config.blocks_to_swap):
        return
    for besides in ({}, {"use_gradient_checkpointing": True, "fused_backward": True}):
        changed = plan.parameters.model_copy(update={"blocks_to_swap": number, **besides})
        with collect_problems() as problems:
            with_number_of_blocks(changed, plan.model, plan.training)
            report(*update_problems(changed, config.optimizer, config.precision, plan.machine.world_size))
        if not problems:
            numbers = range(max(SWAP_BUFFERS, config.blocks_to_swap) + 1, number + 1)
            change = partial(replace, **({"recompute": True, "fused_backward": True} if besides else {}))
            degrees = [partial(change, blocks_to_swap=blocks) for blocks in numbers]
            yield MemoryOption("time", ("blocks_to_swap", *besides), degrees)
            return


def _optimizer_options(plan: RunPlan) -> Iterator[MemoryOption]:
    """Yield other optimizers than the default one; whoever chose another one, or its arguments, wants those."""
    if plan.parameters.optimizer != "adamw" or plan.parameters.optimizer_args:
        return
    for other in OTHER_OPTIMIZERS:
        if choice := _choose(plan, other):
            yield MemoryOption(other.cost, tuple(other.parameters), [partial(replace, optimizer=choice)])


def _choose(plan: RunPlan, other: OtherOptimizer) -> OptimizerChoice | None:
    """Return the choice of another optimizer; None if other parameters of the run do not go with it."""
    with collect_problems(missing_apart=True) as problems:
        choice = choose_optimizer(plan.parameters.model_copy(update=other.parameters), DEFAULT, frozenset())
    return None if problems else choice


def _storage_options(plan: RunPlan, config: MemoryConfig) -> Iterator[MemoryOption]:
    """Yield weight stores for components of which no weight trains other than by a LoRA."""
    changing = {*plan.training.full, *plan.training.parts}
    for name in plan.model.components:
        if name not in changing and plan.model.shapes.get(name) and config.storage[name] == "plain":
            for storage, quantization in QUANTIZATIONS.items():
                stored = partial(_stored, component=name, storage=storage)
                yield MemoryOption(quantization.cost, ("quant_options",), [stored])


def _stored(config: MemoryConfig, component: str, storage: str) -> MemoryConfig:
    return replace(config, storage={**config.storage, component: storage})


def _scope_options(plan: RunPlan, config: MemoryConfig) -> Iterator[MemoryOption]:
    """Yield a smaller batch, a LoRA of lower rank, shorter clips, then smaller images."""
    target, sizes, rank = plan.model.variant.target, config.sizes, config.rank
    if sizes.batch > 1:
        yield MemoryOption("scope", ("batch_size",), [partial(_at_most, batch=1)])
    if plan.training.lora_component and rank > 1:
        ranks = [lower for lower in (rank // 2, rank // 4) if lower]
        yield MemoryOption("scope", ("lora_rank",), [partial(replace, rank=lower) for lower in ranks])
    if sizes.images[0][0] > 1:
        lengths = [int(sizes.images[0][0] * share) // target.frame_step * target.frame_step + 1 for share in SHARES]
        yield MemoryOption("scope", ("num_frames",), [partial(_at_most, frames=frames) for frames in lengths])
    areas = [partial(_at_most, images=shrink(sizes, share, target.size_factor).images) for share in SHARES]
    fixed = plan.parameters.height and plan.parameters.width
    yield MemoryOption("scope", ("height", "width") if fixed else ("max_pixels",), areas)


def _at_most(
    config: MemoryConfig,
    batch: int | None = None,
    frames: int | None = None,
    images: tuple[MediaSize, ...] = (),
) -> MemoryConfig:
    """Return a config whose batch, clips and images are not larger than these."""
    sizes = config.sizes
    shapes = tuple(
        (min(length, frames or length), min(height, most[1]), min(width, most[2]))
        for (length, height, width), most in zip(sizes.images, images or sizes.images, strict=True)
    )
    return replace(config, sizes=replace(sizes, batch=min(sizes.batch, batch or sizes.batch), images=shapes))


def parameter_changes(plan: RunPlan, after: MemoryConfig, before: MemoryConfig) -> tuple[ParameterChange, ...]:
    """Return the parameters that make one config of another, which is that of the plan."""
    return tuple(
        change
        for changes in (
            _changed_activations,
            _changed_updates,
            _changed_placement,
            _changed_optimizer,
            _changed_storage,
            _changed_scope,
        )
        for change in changes(plan, after, before)
    )


def _changed_activations(plan: RunPlan, after: MemoryConfig, before: MemoryConfig) -> Iterator[ParameterChange]:
    if after.offload and not before.offload:
        words = "block inputs in host memory"
        words = words if before.recompute else f"recomputed activations, {words}"
        yield ParameterChange(words, "use_gradient_checkpointing_offload", True)
    elif after.recompute and not before.recompute:
        yield ParameterChange("recomputed activations", "use_gradient_checkpointing", True)
    if after.checkpointing != before.checkpointing:
        yield ParameterChange(CHECKPOINTING_WORDS[after.checkpointing], "checkpointing", after.checkpointing)


def _changed_updates(plan: RunPlan, after: MemoryConfig, before: MemoryConfig) -> Iterator[ParameterChange]:
    if after.fused_backward and not before.fused_backward:
        yield ParameterChange("updates in the backward pass", "fused_backward", True)
    if after.trained_dtype != before.trained_dtype:
        yield ParameterChange("weights trained in bf16", "trained_dtype", after.trained_dtype)


def _changed_placement(plan: RunPlan, after: MemoryConfig, before: MemoryConfig) -> Iterator[ParameterChange]:
    if after.blocks_to_swap != before.blocks_to_swap:
        of_all = len(swappable_blocks(plan.model, plan.training))
        words = f"{after.blocks_to_swap} of {of_all} blocks in host memory"
        yield ParameterChange(words, "blocks_to_swap", after.blocks_to_swap)
    if after.optimizer_on_host and not before.optimizer_on_host:
        yield ParameterChange("optimizer state in host memory", "enable_optimizer_cpu_offload", True)


def _changed_optimizer(plan: RunPlan, after: MemoryConfig, before: MemoryConfig) -> Iterator[ParameterChange]:
    if after.optimizer == before.optimizer:
        return
    other = next(other for other in OTHER_OPTIMIZERS if _choose(plan, other) == after.optimizer)
    for name, value in other.parameters.items():
        yield ParameterChange(other.words, name, value)


def _changed_storage(plan: RunPlan, after: MemoryConfig, before: MemoryConfig) -> Iterator[ParameterChange]:
    options, words = [*split_quant_options(plan.parameters.quant_options)], []
    for storage, quantization in QUANTIZATIONS.items():
        names = [name for name, kept in after.storage.items() if kept == storage != before.storage[name]]
        options += [QuantOption((_entry(plan, name),), storage) for name in names]
        words += [f"{', '.join(names)} in {quantization.words}"] if names else []
    if words:
        yield ParameterChange(", ".join(words), "quant_options", join_quant_options(options))


def _entry(plan: RunPlan, component: str) -> str:
    """Return what the model parameters call the files of a component."""
    return plan.model.components[component].origin.partition(", ")[0]


def _changed_scope(plan: RunPlan, after: MemoryConfig, before: MemoryConfig) -> Iterator[ParameterChange]:
    sizes, old = after.sizes, before.sizes
    if sizes.batch != old.batch:
        yield ParameterChange(f"batch size {sizes.batch}", "batch_size", sizes.batch)
    if after.rank != before.rank:
        yield ParameterChange(f"rank {after.rank}", "lora_rank", after.rank)
    frames, height, width = sizes.images[0]
    if frames != old.images[0][0]:
        yield ParameterChange(pluralize(frames, "frame"), "num_frames", frames)
    if sizes.area == old.area:
        return
    words = f"at most {width} x {height}"
    if plan.parameters.height and plan.parameters.width:
        yield ParameterChange(words, "height", height)
        yield ParameterChange(words, "width", width)
    else:
        factor = plan.model.variant.target.size_factor
        share = next(share for share in SHARES if shrink(old, share, factor).area == sizes.area)
        yield ParameterChange(words, "max_pixels", int(old.area * share))

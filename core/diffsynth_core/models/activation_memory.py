"""Memory of activations, measured on the modules that train.

Their forward pass runs on the meta device: every tensor has its shape, dtype and storage, and none has values, so that
models and batches of any size take no memory and little time (`FakeTensorMode` takes four times as long, and is private
to PyTorch). Of a list of blocks a few may be built; what the second of them adds counts for those that are not.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet, finalize

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode  # no public module has it
from torch.utils._pytree import tree_leaves

from diffsynth_core.adapters.tensors import place
from diffsynth_core.config.choices import RECOMPUTATIONS, Recomputation
from diffsynth_core.models.activation_cache import StepActivations
from diffsynth_core.models.autocast import Autocast
from diffsynth_core.models.checkpointing import blocks_of, parts_of
from diffsynth_core.models.family import Family
from diffsynth_core.models.loading import swap_layers, tie
from diffsynth_core.models.prepare import ComponentSetup, prepare_component
from diffsynth_core.models.size_facts import StepSizes
from diffsynth_core.models.spec import EncoderFacts, Variant
from diffsynth_core.models.weight_store import find_store

Owner = tuple[str, int]
"""Which of a list of blocks something belongs to: the list by component and name, and the place in it."""


@dataclass(frozen=True)
class MeasuredComponent:
    """A component that takes part in a step.

    `config`: constructor settings of what is built. `dtype`: of frozen weights.
    `float32`: names of weights that are float32 whatever the others are. `storage`: the weight store of frozen ones.
    `blocks`: the lists of blocks that stand for longer ones -> how many blocks those have.
    """

    config: Mapping[str, Any]
    dtype: torch.dtype
    setup: ComponentSetup
    float32: frozenset[str] = frozenset()
    storage: str = "plain"
    blocks: Mapping[str, int] = field(default_factory=dict)

    @property
    def recomputation(self) -> Recomputation:
        """What is recomputed of its blocks, where they are."""
        return RECOMPUTATIONS[self.setup.checkpointing or "full"]


@dataclass(eq=False)
class _Saved:
    """A tensor that autograd keeps: its place in the order of all, and what was computed when it was saved."""

    tensor: Tensor
    number: int
    block: "_Block | None"
    part: "_Part | None"
    owner: Owner | None


@dataclass(eq=False)
class _Part:
    """One call of a part of a block that is recomputed on its own."""

    inputs: tuple[Tensor, ...]


@dataclass(eq=False)
class _Block:
    """One call of a block that may be recomputed; `attention`: what is kept of that."""

    inputs: tuple[Tensor, ...]
    owner: Owner | None
    recomputation: Recomputation
    autocast_bytes: int = 0
    attention: list[Tensor] = field(default_factory=list)
    parts: list[_Part] = field(default_factory=list)


class _Recorder:
    """Records what autograd keeps, by block; stands in for the checkpointing of blocks, without which all is kept."""

    def __init__(
        self, family: Family, modules: Mapping[str, nn.Module], components: Mapping[str, MeasuredComponent]
    ) -> None:
        self._alive: WeakSet[_Saved] = WeakSet()
        self._number = 0
        self._block: _Block | None = None
        self._part: _Part | None = None
        self._owner: Owner | None = None
        self.blocks: list[_Block] = []
        self.further: dict[str, int] = {}
        self._places: dict[Owner, int] = {}
        for name, component in components.items():
            start = 0
            for blocks in family.facts.component(name).blocks:
                built = list(modules[name].get_submodule(blocks).children())
                count = component.blocks.get(blocks, len(built))
                further = self.further[f"{name}.{blocks}"] = count - len(built)
                for index, block in enumerate(built):
                    self._places[f"{name}.{blocks}", index] = start + index + (further if index > 1 else 0)
                    block.register_forward_pre_hook(partial(self._enter, (f"{name}.{blocks}", index)))
                    block.register_forward_hook(self._leave)
                start += count
            if component.recomputation.parts:
                for block in blocks_of(modules[name], family.facts.component(name)):
                    for part in parts_of(block):
                        part.register_forward_pre_hook(self._enter_part, with_kwargs=True)
                        part.register_forward_hook(self._leave_part)

    @property
    def saved(self) -> list[_Saved]:
        """What is kept now, in the order in which it was saved."""
        return sorted(self._alive, key=lambda saved: saved.number)

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._save, lambda saved: saved.tensor)

    def call_block(
        self, autocast: Autocast, recomputation: Recomputation, function: Callable[..., Any], *args: Any
    ) -> Any:
        """`torch.utils.checkpoint.checkpoint` without recomputation."""
        outer, before, calls = self._block, autocast.weight_bytes, len(autocast.attention)
        self._block = _Block(tuple(value for value in args if isinstance(value, Tensor)), None, recomputation)
        self.blocks.append(self._block)
        result = function(*args)
        self._block.autocast_bytes = autocast.weight_bytes - before
        if recomputation.keeps_attention:
            self._block.attention = [tensor for call in autocast.attention[calls:] for tensor in call]
        self._block = outer
        return result

    def times(self, owner: Owner | None) -> int:
        """How many blocks a measured one stands for: the second for all that are not built."""
        return 1 + self.further[owner[0]] if owner and owner[1] == 1 else 1

    def kept(self, block: _Block) -> int:
        """How many of the blocks that a measured one stands for are not recomputed."""
        every = block.recomputation.keeps_every
        if every is None or block.owner is None:
            return 0
        first = self._places[block.owner]
        return (first + self.times(block.owner)) // every - first // every

    def _enter(self, owner: Owner, *_: Any) -> None:
        self._owner = owner
        if self._block:
            self._block.owner = owner

    def _leave(self, *_: Any) -> None:
        self._owner = None

    def _enter_part(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self._part = _Part(tuple(value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)))
        if self._block:
            self._block.parts.append(self._part)

    def _leave_part(self, *_: Any) -> None:
        self._part = None

    def _save(self, tensor: Tensor) -> _Saved:
        self._number += 1
        saved = _Saved(tensor, self._number, self._block, self._part, self._owner)
        self._alive.add(saved)
        return saved


@dataclass(frozen=True)
class StepInputs:
    """What a step reads: a micro-batch of these sizes, part of which `encoders` make in the step itself."""

    variant: Variant
    encoders: tuple[EncoderFacts, ...]
    sizes: StepSizes

    def blank_sample(self, text_column: str) -> dict[str, Any]:
        """A sample of these sizes, as encoders take it."""
        target, *shown = (torch.empty(3, *image, device="meta") for image in self.sizes.images)
        if self.variant.step_components:
            shown = [target]  # a ControlNet follows an image of the same size
        conditions = {condition.name: shown for condition in self.variant.conditions}
        values = {value.column: "" if value.kind == "text" else 0.0 for value in self.variant.values}
        return {text_column: "", self.variant.target.column: target, **conditions, **values}


def measure_step(
    family: Family,
    components: Mapping[str, MeasuredComponent],
    inputs: StepInputs,
    autocast: torch.dtype | None,
    device: str,
) -> StepActivations:
    """What a step keeps from its forward pass to its backward pass.

    Args:
        components: those that take part, by name.
        autocast: the dtype that linear layers compute in; None: that of their weights.
        device: cpu or cuda: autocast and norms differ between them.
    """
    modules = {name: _build(family, name, component) for name, component in components.items()}
    mode = Autocast(device, autocast, any(each.recomputation.keeps_attention for each in components.values()))
    recorder = _Recorder(family, modules, components)
    for name, module in modules.items():
        _call_blocks_with(module, partial(recorder.call_block, mode, components[name].recomputation))
    with recorder.hooks(), mode, torch.autocast("cpu", autocast, enabled=autocast is not None):
        losses = _losses(family, modules, inputs)
    tensors = [tensor for module in modules.values() for tensor in (*module.parameters(), *module.buffers())]
    result = _add_up(recorder, set(_storages(tensors)))
    del losses  # until here the graph holds what it keeps
    return result


def _losses(family: Family, modules: Mapping[str, nn.Module], inputs: StepInputs) -> Tensor:
    """The losses of a micro-batch without values, `[B]`."""
    sizes, raw = inputs.sizes, inputs.blank_sample(family.facts.text_column)
    samples = []
    for _ in range(sizes.batch):
        with torch.device("meta"):
            encoded = family.blank_encoding(inputs.variant, modules[family.facts.denoiser], sizes)
        for encoder in inputs.encoders:
            length = sizes.text_tokens + (encoder.caption.dropped if encoder.caption else 0)
            tokenizers = dict.fromkeys(family.facts.tokenizers, BlankTokenizer(length))
            made = family.encode(encoder, {**modules, **tokenizers}, raw)
            encoded |= {name: tensor.to("meta") for name, tensor in made.items()}
        samples.append(encoded)
    batch = family.collate(samples)
    latents, sigma = batch["latents"].float(), torch.empty(sizes.batch, device="meta")
    prediction = family.predict_velocity(modules, torch.empty_like(latents), sigma, batch)
    return (prediction.float() - latents).pow(2).flatten(1).mean(1)


class BlankTokenizer:
    """Makes as many tokens of every text, on the meta device."""

    attention_mask = None
    """As of a text without padding: models compare a mask's values."""
    encodings = (SimpleNamespace(overflowing=()),)
    """As of a text that is not truncated."""

    def __init__(self, length: int) -> None:
        self.input_ids = torch.empty(1, length, dtype=torch.int64, device="meta")

    def __call__(self, text: Any, padding: str | None = None, max_length: int = 0, **_: Any) -> "BlankTokenizer":
        return BlankTokenizer(max_length) if padding == "max_length" else self

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        """Return an empty text: the tokens do not depend on it."""
        return ""


def _build(family: Family, name: str, component: MeasuredComponent) -> nn.Module:
    """A component as training has it, on the meta device."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        module = family.build(name, component.config)
    module.eval().requires_grad_(False)
    facts = family.facts.component(name)
    swap_layers(facts, module, find_store(component.storage), component.dtype)
    # The recorder stands in for what repeats parts of blocks, as for what repeats blocks.
    whole = replace(component.setup, checkpointing="full" if component.setup.checkpointing else None)
    prepare_component(family, name, module, whole)
    for weight, parameter in list(module.named_parameters()):
        in_files = weight.replace(".base_layer.", ".")
        wide = ".lora_" in weight or in_files in component.float32 or facts.stays_float32(in_files)
        if parameter.is_floating_point():
            dtype = torch.float32 if wide else component.dtype
            place(module, weight, parameter.detach().to(dtype))
    for buffer, tensor in list(module.named_buffers()):
        place(module, buffer, tensor.to("meta"))
    tie(module)
    return module


def _call_blocks_with(module: nn.Module, call: Callable[..., Any]) -> None:
    """Have `call(block, *inputs)` in the place of the checkpointing of a module's blocks, where it has that.

    The public methods that switch checkpointing on take no function in transformers. Both libraries have the private
    one that they call; a test fails when one of them calls it otherwise. The flag of each block says whether it is on:
    its other name is a property of the module that transformers warns about.
    """
    if any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
        module._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=call)  # type: ignore[operator]


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the storages of tensors, each once, by identity.

    `_cdata` is the address of the storage: on the meta device `data_ptr` is 0 for all, and Python's `id` differs
    between two views of one storage.
    """
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in storages}


def _add_up(recorder: _Recorder, weights: set[int]) -> StepActivations:
    saved, blocks = recorder.saved, recorder.blocks
    outside = [(one.tensor, recorder.times(one.owner)) for one in saved if one.block is None]
    inputs = [(tensor, recorder.times(block.owner)) for block in blocks for tensor in (*block.inputs, *block.attention)]
    whole = [(one.tensor, times) for one in saved if one.block and (times := recorder.kept(one.block))]
    kept = weights | _storages([tensor for tensor, _ in (*outside, *inputs)]).keys()
    in_blocks: dict[_Block, list[_Saved]] = defaultdict(list)
    for one in saved:
        if one.block:
            in_blocks[one.block].append(one)
    return StepActivations(
        stored=_total([(one.tensor, recorder.times(one.owner)) for one in saved], weights),
        checkpointed=_total([*outside, *inputs, *whole], weights),
        largest_block=max((_recomputed(block, ones, kept) for block, ones in in_blocks.items()), default=0),
        block_inputs=max((_bytes(block.inputs, weights) for block in blocks), default=0),
        autocast_weights=sum(block.autocast_bytes * recorder.times(block.owner) for block in blocks),
    )


def _recomputed(block: _Block, saved: Iterable[_Saved], apart: Collection[int]) -> int:
    """Bytes of a block while it is recomputed: what it keeps, and of parts that are recomputed on their own what they
    get, and what the one keeps that keeps most.
    """
    outside = [tensor for part in block.parts for tensor in part.inputs]
    in_parts: dict[_Part, list[Tensor]] = defaultdict(list)
    for one in saved:
        (in_parts[one.part] if one.part else outside).append(one.tensor)
    there = {*apart, *_storages(outside)}
    return _bytes(outside, apart) + max((_bytes(tensors, there) for tensors in in_parts.values()), default=0)


def _bytes(tensors: Sequence[Tensor], apart: Collection[int]) -> int:
    return sum(size for storage, size in _storages(tensors).items() if storage not in apart)


def _total(tensors: Sequence[tuple[Tensor, int]], apart: Collection[int]) -> int:
    """Bytes of all storages; each belongs to what has it first, and counts as often as stands beside the tensor."""
    total, seen = 0, set(apart)
    for tensor, times in tensors:
        ((storage, size),) = _storages([tensor]).items()
        if storage not in seen:
            seen.add(storage)
            total += size * times
    return total


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes at once of storages that operations make, and that were not there before."""

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._before = set(_storages(before))
        self._live: dict[int, int] = {}
        self._now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self._before and storage._cdata not in self._live:
                self._live[storage._cdata] = storage.nbytes()
                self._now += storage.nbytes()
                finalize(storage, self._release, storage._cdata)
        self.peak = max(self.peak, self._now)
        return result

    def _release(self, storage: int) -> None:
        self._now -= self._live.pop(storage)


def measure_encoders(
    family: Family, name: str, config: Mapping[str, Any], dtype: torch.dtype, inputs: StepInputs
) -> int:
    """Bytes at the fullest moment of a frozen component's work for each of the encoders, weights apart."""
    module = _build(family, name, MeasuredComponent(config, dtype, ComponentSetup()))
    sample = inputs.blank_sample(family.facts.text_column)
    there = [*module.parameters(), *module.buffers(), *tree_leaves(sample)]
    with torch.no_grad(), Autocast("cuda", None), LiveBytes(filter(torch.is_tensor, there)) as live:
        for encoder in inputs.encoders:
            family.encode(encoder, {name: module}, sample)
    peak: int = live.peak
    return peak


def measure_decoder(
    family: Family, name: str, config: Mapping[str, Any], dtype: torch.dtype, inputs: StepInputs
) -> int:
    """Bytes at the fullest moment of a frozen VAE's work when it decodes what its encoder makes, weights apart.

    Args:
        inputs: with the encoder of the target.
    """
    module = _build(family, name, MeasuredComponent(config, dtype, ComponentSetup()))
    sample = inputs.blank_sample(family.facts.text_column)
    with torch.no_grad(), Autocast("cuda", None):
        (encoder,) = inputs.encoders
        latents = family.encode(encoder, {name: module}, sample)["latents"].float()[None]
        with LiveBytes([*module.parameters(), *module.buffers(), latents]) as live:
            family.decode({name: module}, latents)
    peak: int = live.peak
    return peak

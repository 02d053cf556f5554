"""What autograd keeps for the backward pass, counted from sizes alone. No torch.

A family's `memory` module plays the forward pass of its transformer on a `Tape`, operation by operation. Each operation
notes the memory that the same operation of PyTorch saves: what its gradients need of inputs that take gradients, each
memory once, weights not at all, for they are there anyway.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

BYTES = {"float8": 1, "bool": 1, "bfloat16": 2, "float16": 2, "float32": 4, "complex64": 8, "float64": 8}
RANK_OF_DTYPES = ("bool", "bfloat16", "float16", "float32", "float64", "complex64")
"""What two numbers are computed in together is the later of theirs."""
WIDE_UNDER_AUTOCAST = {"cpu": frozenset[str](), "cuda": frozenset({"layer_norm", "rms_norm"})}
"""Of the operations here those that autocast does in float32, by kind of device. Source: aten/src/ATen/autocast_mode.h
(`AT_FORALL_FP32`) for accelerators, autocast_mode.cpp (`KERNEL_CPU`) for the CPU."""

MediaSize = tuple[int, int, int]
"""(frames, height, width) in pixels."""


@dataclass(eq=False)
class Memory:
    """One piece of memory; `weight`: it belongs to the model."""

    bytes: int
    weight: bool = False


@dataclass(frozen=True)
class Value:
    """A tensor: its shape, its dtype, whether it takes gradients, and the memory that it is a view of."""

    shape: tuple[int, ...]
    dtype: str
    grad: bool
    memory: Memory

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Network:
    """The weights of a network in training.

    `dtype`: the format of frozen weights. `wide`: parts of names whose weights are float32 whatever the others are.
    `trained`: names of weights that take gradients. `masters`: those that are float32 for training, which may be more.
    `lora`: rank by module. `float8`: modules whose weights are kept in 8-bit floats.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtype: str
    trained: frozenset[str] = frozenset()
    masters: frozenset[str] = frozenset()
    lora: Mapping[str, int] = field(default_factory=dict)
    float8: frozenset[str] = frozenset()
    wide: frozenset[str] = frozenset()

    def dtype_of(self, name: str) -> str:
        """The dtype of a weight."""
        wide = name in self.masters or not self.wide.isdisjoint(name.split("."))
        return "float32" if wide else self.dtype


@dataclass(frozen=True)
class StepSizes:
    """What one micro-batch brings to the transformer.

    `images`: what is trained on, then each image shown.
    `text_tokens`: of the longest text, with images read with it, where the family's are not all of one length.
    `settings`: constructor settings that are switched on.
    `given`: some latents stand clean among the others, so that each token has a timestep of its own.
    """

    batch: int
    images: tuple[MediaSize, ...]
    text_tokens: int
    settings: frozenset[str] = frozenset()
    given: bool = False

    @property
    def area(self) -> int:
        """Pixels of a frame of what is trained on."""
        return self.images[0][1] * self.images[0][2]

    def tokens(self, side: int) -> list[int]:
        """Tokens of each image, given the side of one in pixels."""
        return [height // side * (width // side) for _, height, width in self.images]


class Tape:
    """The memory that a forward pass keeps, while it is played.

    Args:
        autocast: the dtype that linear layers compute in; None: that of their weights.
        device: cpu or cuda: autocast differs between them.
        recompute: blocks keep their inputs alone, and are played again in the backward pass, one at a time. Beside what
            is `kept`, either the `casts` of weights are there, of which autocast lets go behind the forward pass, or
            later what one block keeps (`largest_block`) and has got (`block_inputs`), in bytes.
    """

    def __init__(
        self, network: Network, autocast: str | None = None, device: str = "cuda", recompute: bool = False
    ) -> None:
        self.network, self.autocast = network, autocast
        self._wide = WIDE_UNDER_AUTOCAST[device] if autocast else frozenset()
        self._fused, self._recompute = device != "cpu", recompute
        self._kept: set[Memory] = set()
        self._casts: dict[str, Memory] = {}
        self._block: set[Memory] | None = None
        self._block_casts: dict[str, Memory] = {}
        self.casts = 0
        self.largest_block = self.block_inputs = 0

    @property
    def kept(self) -> int:
        """Bytes kept from the forward pass on."""
        return sum(memory.bytes for memory in self._kept)

    # values

    def given(self, *shape: int, dtype: str = "float32") -> Value:
        """A value that comes from outside and takes no gradient."""
        return self._new(shape, dtype, grad=False)

    def weight(self, name: str) -> Value:
        """A weight that is used as it is: a norm's scale, a table."""
        dtype = self.network.dtype_of(name)
        shape = self.network.shapes[name]
        return Value(shape, dtype, name in self.network.trained, Memory(0, weight=True))

    def view(self, value: Value, *shape: int) -> Value:
        """The same memory seen in another shape, or a part of it."""
        return Value(shape, value.dtype, value.grad, value.memory)

    def cut(self, value: Value, *shape: int) -> Value:
        """A stretch of `[B, L, C]` in one piece: of a batch it is in several, which are brought together."""
        part = self.view(value, *shape)
        return part if shape[0] == 1 else self.copy(part)

    def copy(self, value: Value) -> Value:
        """The same numbers in memory of their own."""
        return self._new(value.shape, value.dtype, value.grad)

    def cast(self, value: Value, dtype: str) -> Value:
        """The same numbers in another format; nothing where they are in it."""
        return value if value.dtype == dtype else self._new(value.shape, dtype, value.grad)

    # operations

    def linear(self, states: Value, module: str) -> Value:
        """x W^T + b, and the LoRA beside it: every layer has a cast of its own of an input in another format."""
        network, name = self.network, f"{module}.weight"
        compute = self.autocast or network.dtype_of(name)
        shape = (*states.shape[:-1], network.shapes[name][0])
        trained = not network.trained.isdisjoint((name, f"{module}.bias"))
        if module not in network.float8:
            if name in network.trained:
                self._save(self.cast(states, compute))
            if states.grad:
                self._save_weight(name, compute)
        if module not in network.lora:
            return self._new(shape, compute, states.grad or trained)
        self._save(self.cast(self.cast(states, "float32"), compute))
        rank = network.lora[module]
        if compute != "float32":
            if states.grad:
                self._save_cast(f"{module}.A", rank * states.shape[-1], compute)
            self._save_cast(f"{module}.B", rank * shape[-1], compute)
        self._save(self._new((*states.shape[:-1], rank), compute, grad=True))
        return self._new(shape, compute, grad=True)

    def convolution(self, states: Value, module: str, *shape: int) -> Value:
        """A convolution, whose output has `shape`; it keeps its input where anything of it takes gradients."""
        name = f"{module}.weight"
        compute = self.autocast or self.network.dtype_of(name)
        trained = not self.network.trained.isdisjoint((name, f"{module}.bias"))
        if states.grad or name in self.network.trained:
            self._save(self.cast(states, compute))
            self._save_weight(name, compute)
        return self._new(shape, compute, states.grad or trained)

    def layer_norm(self, states: Value, scale: str | None = None) -> Value:
        """Over the last axis; with the trained or frozen weights of module `scale`, or none."""
        states = self._widened(states, "layer_norm")
        grad = states.grad or (scale is not None and f"{scale}.weight" in self.network.trained)
        if grad:
            self._save(states)
            self._save_numbers(2 * states.count // states.shape[-1])
        return self._new(states.shape, states.dtype, grad)

    def rms_norm(self, states: Value, scale: str) -> Value:
        """Over the last axis, as `torch.nn.RMSNorm` does it: on the CPU in steps and in float32, elsewhere in one."""
        name = f"{scale}.weight"
        states = self._widened(states, "rms_norm")
        trained = name in self.network.trained
        grad = states.grad or trained
        wide = states if self._fused else self.cast(states, "float32")
        if grad:
            self._save(wide)
            self._save_numbers(wide.count // wide.shape[-1])
        if trained and not self._fused:
            self._save(self.copy(wide))
        return self._new(states.shape, states.dtype, grad)

    def rms_norm_in_steps(self, states: Value, scale: str) -> Value:
        """Over the last axis, as the `RMSNorm` of diffusers does it: square, mean, inverse root, two products."""
        wide = self.cast(states, "float32")
        inverse = self._new((*states.shape[:-1], 1), "float32", states.grad)
        if states.grad:
            self._save(wide, inverse)
        normed = self.multiply(states, inverse)
        weight = self.weight(f"{scale}.weight")
        return self.multiply(self.cast(normed, weight.dtype) if weight.dtype != "float32" else normed, weight)

    def multiply(self, left: Value, right: Value) -> Value:
        """Of which each side is kept for the gradient of the other."""
        if left.grad:
            self._save(right)
        if right.grad:
            self._save(left)
        return self._joined(left, right)

    def added(self, table: Value, values: Value, *shape: int) -> Value:
        """A table of weights and values that are seen as `shape`, added in float32 or the wider of both."""
        wide = max(table.dtype, "float32", key=RANK_OF_DTYPES.index)
        return self._new(shape, wide, table.grad or values.grad)

    def add(self, left: Value, right: Value) -> Value:
        """Which keeps nothing."""
        return self._joined(left, right)

    def concatenate(self, *values: Value, axis: int) -> Value:
        """Side by side along an axis."""
        first = values[0]
        length = sum(value.shape[axis] for value in values)
        place = axis % len(first.shape)
        shape = (*first.shape[:place], length, *first.shape[place + 1 :])
        dtype = max((value.dtype for value in values), key=RANK_OF_DTYPES.index)
        return self._new(shape, dtype, any(value.grad for value in values))

    def chosen(self, value: Value, *shape: int) -> Value:
        """One of two parts of a value for each place of `shape`, by a mask over all of it but the last axis."""
        if value.grad:
            self._save(self._new((*shape[:-1], 1), "bool", grad=False))
        return self._new(shape, value.dtype, value.grad)

    def turn(self, states: Value, rotary: Value) -> Value:
        """Rotary positions as products of complex numbers, in float32, back in the format of `states`."""
        wide = self.cast(states, "float32")
        if wide.grad:
            self._save(rotary)
        return self.cast(self._new(states.shape, "float32", states.grad), states.dtype)

    def turn_in_parts(self, states: Value, cosines: Value, sines: Value) -> Value:
        """Rotary positions as two products and their sum, in float32, back in the format of `states`."""
        if states.grad:
            self._save(cosines, sines)
        return self.cast(self._new(states.shape, "float32", states.grad), states.dtype)

    def activation(self, states: Value) -> Value:
        """GELU, SiLU and the like, which keep their input."""
        if states.grad:
            self._save(states)
        return self._new(states.shape, states.dtype, states.grad)

    def attention(self, query: Value, key: Value, value: Value) -> Value:
        """Fused attention over `[B, L, heads, size]`: keeps inputs, output, and a number for each query and head.

        So do the flash kernels of CPUs and GPUs, and the memory-efficient ones. The models of diffusers cast the result
        to the format of the queries, which a norm may have made wider than what autocast attends in.
        """
        inputs = [self.cast(part, self.autocast or part.dtype) for part in (query, key, value)]
        grad = any(part.grad for part in inputs)
        result = self._new(query.shape, inputs[0].dtype, grad)
        if grad:
            self._save(*inputs, result)
            self._save_numbers(query.count // query.shape[-1])
        return self.cast(result, query.dtype)

    def error(self, prediction: Value, count: int) -> None:
        """The squared error of what is predicted for `count` latent values, in float32."""
        if prediction.grad:
            self._save_numbers(count)

    @contextmanager
    def block(self, *inputs: Value) -> Iterator[None]:
        """One of the repeated blocks, whose `inputs` are all that it keeps where blocks are recomputed."""
        if not self._recompute:
            yield
            return
        self._save(*inputs)
        self._block, self._block_casts = set(), {}
        yield
        inner = sum(memory.bytes for memory in self._block - self._kept)
        self.largest_block = max(self.largest_block, inner)
        self.block_inputs = max(self.block_inputs, sum(memory.bytes for memory in {value.memory for value in inputs}))
        self.casts += sum(memory.bytes for memory in self._block_casts.values())
        self._block = None

    def _new(self, shape: tuple[int, ...], dtype: str, grad: bool) -> Value:
        return Value(shape, dtype, grad, Memory(math.prod(shape) * BYTES[dtype]))

    def _joined(self, left: Value, right: Value) -> Value:
        """The result of an operation on two values that are broadcast over each other."""
        shape = left.shape if left.count >= right.count else right.shape
        dtype = max(left.dtype, right.dtype, key=RANK_OF_DTYPES.index)
        return self._new(shape, dtype, left.grad or right.grad)

    def _widened(self, states: Value, operation: str) -> Value:
        return self.cast(states, "float32") if operation in self._wide else states

    def _save(self, *values: Value) -> None:
        kept = self._kept if self._block is None else self._block
        kept.update(value.memory for value in values if not value.memory.weight)

    def _save_numbers(self, count: int) -> None:
        """As many float32 numbers."""
        self._save(self._new((count,), "float32", grad=False))

    def _save_weight(self, name: str, compute: str) -> None:
        """A weight, which takes no memory of its own but in another dtype."""
        if self.network.dtype_of(name) != compute:
            self._save_cast(name, math.prod(self.network.shapes[name]), compute)

    def _save_cast(self, name: str, count: int, dtype: str) -> None:
        """A weight in another dtype, which autocast makes once."""
        casts = self._casts if self._block is None else self._block_casts
        if name not in casts:
            casts[name] = Memory(count * BYTES[dtype])
        self._save(Value((count,), dtype, False, casts[name]))

"""Merging of LoRAs into a base in pieces of a few rows: no tensor is ever in memory as a whole.

Several threads read and compute pieces while one writes them in order. Each thread computes with one torch thread:
torch threads within one product wait for each other.
"""

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from diffsynth_core.adapters.deltas import WeightDelta, add_deltas, read_delta, split_delta
from diffsynth_core.adapters.merge import MAX_SILENT_ERROR, RelativeError, Workspace, merge_rows
from diffsynth_core.conversion.lora_inputs import WeightedLora
from diffsynth_core.conversion.merge_plan import MergePlan, outputs_of
from diffsynth_core.conversion.provenance import InputHashes
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.progress import Reporter
from diffsynth_core.weights.dtypes import safetensors_dtype, torch_dtype
from diffsynth_core.weights.key_maps import KeyMap
from diffsynth_core.weights.tensors import dequantize, read_scale
from diffsynth_core.weights.weight_sets import Span
from diffsynth_core.weights.weight_writer import write_outputs

ELEMENTS_AT_ONCE = 2**18
"""Elements of a piece: 1 MB in float32, which fits into a core's cache; the fastest of 2^17 to 2^20."""
MAX_THREADS = 8
"""Maximum number of threads."""


@dataclass(frozen=True)
class MergeResult:
    """The rounding error of the change by all LoRAs, and over the weights that each of them changes."""

    error: RelativeError
    errors: tuple[RelativeError, ...]


def merge(plan: MergePlan, hashes: InputHashes, reporter: Reporter, overwrite: bool = False) -> MergeResult:
    """Execute a plan. `hashes`: of `plan.hashed`, already started.

    Raises:
        FaultsFound: see `output_problems`, before anything is written.
        DiffSynthError: see `write_outputs`; also if a value of a LoRA or of a result is not finite.
    """
    with ExitStack() as opened, _own_threads() as pool:
        merging = _Merging(plan, pool, opened)
        write_outputs(outputs_of(plan, merging.pieces, hashes.wait), plan.inputs, reporter, overwrite)
    result = merging.result()
    if result.error.value > MAX_SILENT_ERROR:
        formats = sorted({plan.format_of(name) for name in plan.changed})
        reporter.warn(
            f"rounding to {', '.join(formats)} loses {result.error.value:.0%} of the change; `--dtype float32` preserves it"
        )
    return result


@contextmanager
def _own_threads() -> Iterator[ThreadPoolExecutor]:
    """Return a pool of threads with one torch thread each, which applies to this thread meanwhile too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(_processors(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _processors() -> int:
    """Return the number of threads that this process may keep busy."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_THREADS, allowed)


_OWN = threading.local()


def _workspace() -> Workspace:
    """Return the workspace of the current thread."""
    if not hasattr(_OWN, "workspace"):
        _OWN.workspace = Workspace()
    return cast(Workspace, _OWN.workspace)


class _Merging:
    """Computes the bytes of the changed tensors, and their rounding errors."""

    def __init__(self, plan: MergePlan, pool: ThreadPoolExecutor, opened: ExitStack) -> None:
        self._plan, self._pool = plan, pool
        self._errors: dict[str, RelativeError] = {}
        self._streams = [
            (one, opened.enter_context(safe_open(one.lora.path, framework="pt", device="cpu"))) for one in plan.loras
        ]
        self._sources = {
            path: opened.enter_context(path.open("rb", buffering=0)).fileno() for path in plan.base.weights.files
        }

    def pieces(self, name: str) -> Callable[[], Iterator[memoryview]]:
        """Return the function that computes the bytes of a tensor in the files."""
        return lambda: self._make(name)

    def result(self) -> MergeResult:
        total = RelativeError()
        for error in self._errors.values():
            total.add(error)
        each = []
        for one in self._plan.loras:
            own = RelativeError()
            for name in sorted({name for tensor in one.lora.weights for name in self._plan.base.names_of(tensor)}):
                own.add(self._errors[name])
            each.append(own)
        return MergeResult(total, tuple(each))

    def _make(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of one tensor."""
        header, span = self._plan.base.weights.tensors[name], self._plan.base.weights.spans[name]
        delta = self._delta(name) if name in self._plan.changed else None
        scale = self._plan.base.scales.get(name)
        columns = math.prod(header.shape[1:]) if delta or scale else 1
        rows = math.prod(header.shape) // max(columns, 1)
        height = max(1, ELEMENTS_AT_ONCE // max(columns, 1))
        error = self._errors[name] = RelativeError(exact_squared=delta.squared_norm if delta else 0.0)
        piece = _Piece(
            name=name,
            source=self._sources[span.path],
            span=span,
            columns=columns,
            stored=torch_dtype(header.dtype),
            written=torch_dtype(self._plan.format_of(name)),
            delta=delta,
            rows=rows,
            scale=read_scale(scale, header.shape) if scale else None,
        )
        jobs = [(begin, min(begin + height, rows)) for begin in range(0, rows, height)]
        for data, squared in _in_order(self._pool, piece.make, jobs):
            error.error_squared += squared
            yield data

    def _delta(self, name: str) -> WeightDelta:
        """Return the change of a tensor in the files by all LoRAs together."""
        return add_deltas([delta for one, stream in self._streams for delta in self._of_one(one, stream, name)])

    def _of_one(self, one: WeightedLora, stream: Any, name: str) -> Iterator[WeightDelta]:
        """Yield the changes of one LoRA to a tensor in the files, one for each public tensor that it is a part of."""
        base = self._plan.base
        names, public_keys = base.layout.names, base.layout.public_keys
        of_component = name.removeprefix(base.prefix)
        own = names.to_targets(of_component) or ()
        weights = dict.fromkeys(weight for part in own if (weight := public_keys.to_source(part)) is not None)
        shapes = names.split_shape(of_component, base.weights.tensors[name].shape)
        for weight in weights:
            if weight in one.lora.weights:
                whole = read_delta(one.lora, stream, weight, base.tensor_shapes[weight])
                parts = {
                    part: split_delta(whole, weight, part, public_keys, base.tensor_shapes[weight])
                    for part in own
                    if public_keys.to_source(part) == weight
                }
                yield _fuse(parts, of_component, names, shapes).scaled(one.weight)


def _fuse(
    parts: Mapping[str, WeightDelta], name: str, names: KeyMap, shapes: Mapping[str, tuple[int, ...]]
) -> WeightDelta:
    """Return the change of a tensor in the files, given those of some of its parts in the module."""
    first = next(iter(parts.values()))

    def fuse(tensors: Mapping[str, Tensor], width: int) -> Tensor:
        whole = {
            part: tensors[part] if part in tensors else torch.zeros(shape[0], width) for part, shape in shapes.items()
        }
        fused: Tensor = names.fuse(name, whole)
        return fused.flatten(1)

    b = fuse({part: delta.B for part, delta in parts.items()}, first.rank)
    differences = tuple(
        (fuse({part: delta.differences[place][0] for part, delta in parts.items()}, first.A.shape[1]), factor)
        for place, (_, factor) in enumerate(first.differences)
    )
    return WeightDelta(first.A, b, differences)


@dataclass(frozen=True)
class _Piece:
    """Rows of one tensor: read, changed, rounded.

    Attributes:
        source: index of the open file that contains it.
        rows: number of rows of the tensor.
        scale: factor that is applied first.
    """

    name: str
    source: int
    span: Span
    columns: int
    stored: torch.dtype
    written: torch.dtype
    delta: WeightDelta | None
    rows: int
    scale: Tensor | None = None

    def make(self, begin: int, end: int) -> tuple[memoryview, float]:
        """Return the bytes of rows, and their squared rounding error."""
        raw, weight = self._read(begin, end)
        if self.scale is not None:
            weight = dequantize(weight, self.scale, self.rows, begin)
        if self.delta is None:
            return as_bytes(self._checked(weight.to(self.written, copy=True))), 0.0
        changed = self.delta.changed_rows(begin, end)
        if self.stored == self.written and not bool(changed.any()):
            return as_bytes(raw.clone()), 0.0
        merged, error = merge_rows(weight, self.delta, self.written, _workspace(), begin)
        if not math.isfinite(error):
            self._checked(merged)
        if self.stored == self.written and not bool(changed.all()):
            merged[~changed] = weight[~changed]  # minus zero, which a sum with zero makes plus zero
        return as_bytes(merged), error

    def _read(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Return rows as bytes and as numbers, in memory that is reused for the next piece."""
        size = self.columns * self.stored.itemsize
        raw = _workspace().take("raw", [-(-(end - begin) * size // 4)]).view(torch.uint8)[: (end - begin) * size]
        target = as_bytes(raw)
        place = self.span.begin + begin * size
        while target:
            done = os.preadv(self.source, [target], place)
            if not done:
                raise DiffSynthError(f"`{self.span.path}` was truncated while it was read", "download the file again")
            target, place = target[done:], place + done
        return raw, raw.view(self.stored).view(end - begin, self.columns)

    def _checked(self, result: Tensor) -> Tensor:
        if not bool(torch.isfinite(result.float()).all()):
            raise DiffSynthError(
                f"`{self.name}` would contain NaN or Inf in {safetensors_dtype(self.written)}",
                "use a wider `--dtype` such as `float32`, or check the base for NaN and Inf",
            )
        return result


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor as a writable view."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _in_order(
    pool: ThreadPoolExecutor,
    make: Callable[[int, int], tuple[memoryview, float]],
    jobs: Sequence[tuple[int, int]],
) -> Iterator[tuple[memoryview, float]]:
    """Yield results in the order of their jobs, with a few jobs in progress."""
    under_way: deque[Future[tuple[memoryview, float]]] = deque()
    for job in jobs:
        under_way.append(pool.submit(make, *job))
        if len(under_way) > _processors():
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()

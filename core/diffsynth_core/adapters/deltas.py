"""What LoRA files add to weights, in memory: (alpha / rank) B A (Hu et al. 2021, arXiv:2106.09685), and differences."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.weights.key_maps import KeyMap
from diffsynth_core.weights.lora import FullDifference, Lora, LoraPair, ModuleLora, Rows, group_by_a, num_rows, pairs_of

ELEMENTS_AT_ONCE = 2**20
"""Elements of a delta that are computed at once."""


@dataclass(frozen=True)
class WeightDelta:
    """A change of a weight: the product B @ A, both float32, with every scale in B, and full differences.

    `A`: `[rank, in]`, of a convolution `[rank, in * kernel]`. `B`: `[out, rank]`. The rank may be 0.
    `differences`: `[out, in]` of any floating-point dtype, each with its factor.
    """

    A: Tensor
    B: Tensor
    differences: tuple[tuple[Tensor, float], ...] = ()

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return len(self.A)

    @property
    def squared_norm(self) -> float:
        """||B A + sum of differences||_F^2, in float64; without differences, and so without the product, it is the sum
        of the entries of (B^T B) * (A A^T)."""
        if self.differences:
            step = max(1, ELEMENTS_AT_ONCE // max(1, self.A.shape[1]))
            return sum(
                float(self.dense(begin, begin + step).double().square().sum()) for begin in range(0, len(self.B), step)
            )
        b, a = self.B.double(), self.A.double()
        return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))

    def dense(self, begin: int, end: int) -> Tensor:
        """The change of these rows, float32."""
        product = self.B[begin:end] @ self.A
        for difference, factor in self.differences:
            product.add_(difference[begin:end], alpha=factor)
        return product

    def changed_rows(self, begin: int, end: int) -> Tensor:
        """Which of these rows it changes."""
        changed = self.B[begin:end].any(dim=1)
        for difference, _ in self.differences:
            changed |= (difference[begin:end] != 0).any(dim=1)
        return changed

    def scaled(self, weight: float) -> "WeightDelta":
        """The change times `weight`."""
        return WeightDelta(self.A, self.B * weight, tuple((part, factor * weight) for part, factor in self.differences))


def add_deltas(deltas: Sequence[WeightDelta]) -> WeightDelta:
    """The sum of changes of one weight: ranks add up."""
    if len(deltas) == 1:
        return deltas[0]
    return WeightDelta(
        torch.cat([delta.A for delta in deltas]),
        torch.cat([delta.B for delta in deltas], dim=1),
        tuple(part for delta in deltas for part in delta.differences),
    )


def read_delta(lora: Lora, stream: Any, weight: str, shape: Sequence[int]) -> WeightDelta:
    """The change of a tensor of this shape, by its public name, from all that the file has for it.

    Args:
        stream: the file, open with safetensors.

    Raises:
        DiffSynthError: when a value is not finite.
    """
    module = weight.removesuffix(".weight")
    if module != weight and module in lora.modules:
        delta = module_delta(lora.modules[module], stream)
    else:
        delta = WeightDelta(torch.zeros(0, math.prod(shape[1:])), torch.zeros(shape[0], 0))
    if weight not in lora.tensors:
        return delta
    return WeightDelta(delta.A, delta.B, ((_read_difference(lora.tensors[weight], stream, shape), 1.0),))


def module_delta(lora: ModuleLora, stream: Any) -> WeightDelta:
    """All LoRAs of one module as one product: those that share their A keep it once; B is block-diagonal for others."""
    groups = group_by_a(pairs_of(lora))
    begins = accumulate((group[0].rank for group in groups), initial=0)
    columns = {
        id(pair): slice(begin, begin + pair.rank)
        for begin, group in zip(begins, groups, strict=False)
        for pair in group
    }
    stored = {
        id(pair): finite(read_scaled_b(stream, pair).flatten(1), pair.path, pair.B.key) for pair in pairs_of(lora)
    }
    b = torch.zeros(num_rows(lora), sum(group[0].rank for group in groups))
    place = 0
    for span in lora:
        end = place + span.end - span.begin
        if span.stored:
            b[place:end, columns[id(span.stored)]] = stored[id(span.stored)][span.begin : span.end]
        place = end
    return WeightDelta(torch.cat([_read_a(stream, group[0]) for group in groups]), b)


def _read_a(stream: Any, pair: LoraPair) -> Tensor:
    return finite(stream.get_tensor(pair.A.key).float().flatten(1), pair.path, pair.A.key)


def _read_difference(rows: Rows[FullDifference], stream: Any, shape: Sequence[int]) -> Tensor:
    """What a file adds to a whole tensor, `[rows, columns]`, in its own dtype if it is stored in one piece."""
    first = rows[0].stored
    if first and rows[0].end - rows[0].begin == first.rows == shape[0]:
        return finite(stream.get_tensor(first.tensor.key), first.path, first.tensor.key).reshape(shape[0], -1)
    parts = [
        finite(stream.get_tensor(span.stored.tensor.key), span.stored.path, span.stored.tensor.key)[
            span.begin : span.end
        ].float()
        if span.stored
        else torch.zeros(span.end - span.begin, *shape[1:])
        for span in rows
    ]
    return torch.cat(parts).reshape(shape[0], -1)


def finite(tensor: Tensor, path: Path, key: str | None) -> Tensor:
    """A tensor of a file, if all of it is finite.

    Raises:
        DiffSynthError: when it is not.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise DiffSynthError(f"`{path}`: `{key}` contains NaN or Inf", "use an earlier checkpoint")
    return tensor


def read_scaled_b(stream: Any, pair: LoraPair) -> Tensor:
    """B in float32, multiplied by the scale of the LoRA."""
    b: Tensor = stream.get_tensor(pair.B.key)
    return b.float() * pair.scale


class LoraDeltas:
    """What a LoRA file adds to the weights of a module in memory, computed weight by weight.

    Parts of a public module may have separate LoRAs, or none.

    Args:
        shapes: of tensors, by public name.
        public_keys: public names -> names in the module.
    """

    def __init__(self, lora: Lora, stream: Any, shapes: Mapping[str, tuple[int, ...]], public_keys: KeyMap) -> None:
        self._lora, self._stream, self._shapes, self._public_keys = lora, stream, shapes, public_keys

    def of(self, name: str) -> WeightDelta | None:
        """The change of a tensor, by its name in the module; None if the file does not change it."""
        weight = self._public_keys.to_source(name)
        if weight is None or weight not in self._lora.weights:
            return None
        whole = read_delta(self._lora, self._stream, weight, self._shapes[weight])
        return split_delta(whole, weight, name, self._public_keys, self._shapes[weight])


def split_delta(whole: WeightDelta, weight: str, part: str, names: KeyMap, shape: tuple[int, ...]) -> WeightDelta:
    """Of the change of a source tensor of a key map, that of one of its targets, which has some of its rows."""

    def split(tensor: Tensor, row: Sequence[int]) -> Tensor:
        own: Tensor = names.split(weight, tensor.reshape(shape[0], *row))[part]
        return own.reshape(len(own), -1)

    kernel = (1,) * len(shape[2:])
    differences = tuple((split(one, shape[1:]), factor) for one, factor in whole.differences)
    return WeightDelta(whole.A, split(whole.B, (whole.rank, *kernel)), differences)


@contextmanager
def open_deltas(lora: Lora, shapes: Mapping[str, tuple[int, ...]], public_keys: KeyMap) -> Iterator[LoraDeltas]:
    """The changes by a LoRA file, which stays open meanwhile."""
    from safetensors import safe_open

    with safe_open(lora.path, framework="pt", device="cpu") as stream:
        yield LoraDeltas(lora, stream, shapes, public_keys)

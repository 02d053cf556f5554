"""What LoRA files add to weights: (alpha / rank) B A (Hu et al. 2021, arXiv:2106.09685), and whole differences."""

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
from diffsynth_core.weights.lora_files import LoraFile
from diffsynth_core.weights.lora_rows import ModuleLora, StoredLora, group_by_down, loras_of

ROWS_TAKEN_AT_ONCE = 2**20
"""Elements of a change that are computed at once."""


@dataclass(frozen=True)
class Factors:
    """A change of a weight: a product, up @ down, both float32, with every scale in `up`, and whole differences.

    `down`: A, `[rank, in]`, of a convolution `[rank, in * kernel]`. `up`: B, `[out, rank]`. The rank may be 0.
    `differences`: `[out, in]` in any floating-point format, each with what it is multiplied with.
    """

    down: Tensor
    up: Tensor
    differences: tuple[tuple[Tensor, float], ...] = ()

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def squared_norm(self) -> float:
        """||up @ down + sum of differences||^2, in float64; without them, and so without the product, the sum of the
        entries of (up^T up) * (down down^T)."""
        if self.differences:
            rows = range(0, len(self.up), max(1, ROWS_TAKEN_AT_ONCE // max(1, self.down.shape[1])))
            step = max(1, rows.step)
            return sum(float(self.dense(begin, begin + step).double().square().sum()) for begin in rows)
        up, down = self.up.double(), self.down.double()
        return max(0.0, float(((up.T @ up) * (down @ down.T)).sum()))

    def dense(self, begin: int, end: int) -> Tensor:
        """The change of these rows, float32."""
        product = self.up[begin:end] @ self.down
        for difference, scale in self.differences:
            product.add_(difference[begin:end], alpha=scale)
        return product

    def changed_rows(self, begin: int, end: int) -> Tensor:
        """Which of these rows it changes."""
        changed = self.up[begin:end].any(dim=1)
        for difference, _ in self.differences:
            changed |= (difference[begin:end] != 0).any(dim=1)
        return changed

    def scaled(self, weight: float) -> "Factors":
        """The change times `weight`."""
        return Factors(self.down, self.up * weight, tuple((part, scale * weight) for part, scale in self.differences))


def add_factors(changes: Sequence[Factors]) -> Factors:
    """The sum of changes of one weight: ranks add."""
    if len(changes) == 1:
        return changes[0]
    return Factors(
        torch.cat([change.down for change in changes]),
        torch.cat([change.up for change in changes], dim=1),
        tuple(part for change in changes for part in change.differences),
    )


def read_factors(file: LoraFile, stream: Any, weight: str, shape: Sequence[int]) -> Factors:
    """The change of a documented tensor of this shape, put together from what the file has of it.

    LoRAs that share their A keep it once; others stand below each other, in rows and columns of their own.

    Raises:
        DiffSynthError: when a value is not finite.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    change = Factors(torch.zeros(0, columns), torch.zeros(rows, 0))
    module = weight.removesuffix(".weight")
    if module != weight and module in file.modules:
        change = lora_factors(file.modules[module], stream)
    if weight in file.tensors:
        change = add_factors(
            [change, Factors(change.down[:0], change.up[:, :0], _differences(file, stream, weight, shape))]
        )
    return change


def lora_factors(lora: ModuleLora, stream: Any) -> Factors:
    """All LoRAs of one module as one product: B is block-diagonal where they have an A of their own."""
    groups = group_by_down(loras_of(lora))
    begins = accumulate((group[0].rank for group in groups), initial=0)
    columns = {
        id(one): slice(begin, begin + one.rank) for begin, group in zip(begins, groups, strict=False) for one in group
    }
    ups = {id(one): finite(read_scaled_up(stream, one).flatten(1), one.path, one.up.key) for one in loras_of(lora)}
    up = torch.zeros(sum(span.end - span.begin for span in lora), sum(group[0].rank for group in groups))
    place = 0
    for span in lora:
        end = place + span.end - span.begin
        if span.lora:
            up[place:end, columns[id(span.lora)]] = ups[id(span.lora)][span.begin : span.end]
        place = end
    return Factors(torch.cat([_read_down(stream, group[0]) for group in groups]), up)


def _read_down(stream: Any, lora: StoredLora) -> Tensor:
    return finite(stream.get_tensor(lora.down.key).float().flatten(1), lora.path, lora.down.key)


def _differences(file: LoraFile, stream: Any, weight: str, shape: Sequence[int]) -> tuple[tuple[Tensor, float], ...]:
    """What the file adds to a documented tensor as a whole, `[rows, columns]`."""
    spans = file.tensors[weight]
    if spans[0].lora and spans[0].end - spans[0].begin == spans[0].lora.rows == shape[0]:
        key = spans[0].lora.tensor.key
        return ((finite(stream.get_tensor(key), file.path, key).reshape(shape[0], -1), 1.0),)
    parts = [
        finite(stream.get_tensor(span.lora.tensor.key), file.path, span.lora.tensor.key)[span.begin : span.end].float()
        if span.lora
        else torch.zeros(span.end - span.begin, *shape[1:])
        for span in spans
    ]
    return ((torch.cat(parts).reshape(shape[0], -1), 1.0),)


def finite(tensor: Tensor, path: Path, key: str | None) -> Tensor:
    """A tensor of a file, when all of it is finite.

    Raises:
        DiffSynthError: when it is not.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise DiffSynthError(f"`{path}`: `{key}` contains NaN or Inf", "use an earlier checkpoint")
    return tensor


def read_scaled_up(stream: Any, lora: StoredLora) -> Tensor:
    """B of one LoRA in float32, with the scale alpha / rank in it: ours is 1."""
    up: Tensor = stream.get_tensor(lora.up.key)
    return up.float() * lora.scale


class LoraChanges:
    """What a LoRA file adds to the weights of a module in memory, computed weight by weight.

    Parts of a documented module may have LoRAs of their own, or none.

    Args:
        shapes: of tensors by documented name.
        documented: documented names -> names in the module.
    """

    def __init__(self, file: LoraFile, stream: Any, shapes: Mapping[str, tuple[int, ...]], public_keys: KeyMap) -> None:
        self._file, self._stream, self._shapes, self._public_keys = file, stream, shapes, public_keys

    def of(self, name: str) -> Factors | None:
        """The change of a tensor, by its name in the module; None where the file has none."""
        weight = self._public_keys.to_source(name)
        if weight is None or weight not in self._file.weights:
            return None
        whole = read_factors(self._file, self._stream, weight, self._shapes[weight])
        return cut_factors(whole, weight, name, self._public_keys, self._shapes[weight])


def cut_factors(whole: Factors, weight: str, part: str, names: KeyMap, shape: tuple[int, ...]) -> Factors:
    """Of the change of a tensor of theirs that of one of ours, which has some of its rows."""

    def cut(tensor: Tensor, row: Sequence[int]) -> Tensor:
        own: Tensor = names.split(weight, tensor.reshape(shape[0], *row))[part]
        return own.reshape(len(own), -1)

    kernel = (1,) * len(shape[2:])
    differences = tuple((cut(one, shape[1:]), scale) for one, scale in whole.differences)
    return Factors(whole.down, cut(whole.up, (whole.rank, *kernel)), differences)


@contextmanager
def open_changes(file: LoraFile, shapes: Mapping[str, tuple[int, ...]], public_keys: KeyMap) -> Iterator[LoraChanges]:
    """The changes of a LoRA file, which stays open meanwhile."""
    from safetensors import safe_open

    with safe_open(file.path, framework="pt", device="cpu") as stream:
        yield LoraChanges(file, stream, shapes, public_keys)

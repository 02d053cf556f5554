"""LoRA merged into its base: W' = W + sum of (alpha / rank) B A (Hu et al. 2021, arXiv:2106.09685).

Computed in float32 and rounded once, into the number format of the merged weight.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffsynth_core.adapters.lora import read_scaled_up
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.state_dicts.key_maps import KeyMap
from diffsynth_core.state_dicts.lora_files import LoraFile, LoraPart

LOSS_WORTH_A_WARNING = 0.1
"""Share of a change that rounding may lose in silence."""
SUMMED_AT_ONCE = 2**20
"""Squares added up in float32; their sums are added in float64."""


@dataclass
class Loss:
    """How much of changes is lost: ||D' - D|| / ||D|| over all weights, D being what was asked for, D' what came of it.

    Rounding to bfloat16 loses a third of a change of spread 1e-4 on weights of spread 0.02.
    """

    lost_squared: float = 0.0
    asked_squared: float = 0.0

    def add(self, other: "Loss") -> None:
        """Take in the weights of another."""
        self.lost_squared += other.lost_squared
        self.asked_squared += other.asked_squared

    @property
    def share(self) -> float:
        """0 where nothing is lost, and where nothing was asked for."""
        return (self.lost_squared / self.asked_squared) ** 0.5 if self.asked_squared else 0.0


@dataclass(frozen=True)
class Factors:
    """A change of a weight as a product, up @ down, both float32, with every scale in `up`.

    `down`: A, `[rank, in]`, of a convolution `[rank, in * kernel]`. `up`: B, `[out, rank]`.
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def squared_norm(self) -> float:
        """||up @ down||^2, without the product: the sum of the entries of (up^T up) * (down down^T), in float64."""
        up, down = self.up.double(), self.down.double()
        return max(0.0, float(((up.T @ up) * (down @ down.T)).sum()))


def add_factors(changes: Sequence[Factors]) -> Factors:
    """The sum of changes of one weight, as a product again: ranks add."""
    if len(changes) == 1:
        return changes[0]
    return Factors(torch.cat([change.down for change in changes]), torch.cat([change.up for change in changes], dim=1))


def truncate(change: Factors, rank: int) -> tuple[Factors, Loss]:
    """The nearest change of at most this rank (Eckart and Young 1936), and what it loses; in float64.

    By QR of both factors and the singular values of what is left between them, `[rank, rank]`: those of the whole.
    """
    left, between_left = torch.linalg.qr(change.up.double())
    right, between_right = torch.linalg.qr(change.down.double().T)
    u, values, v = torch.linalg.svd(between_left @ between_right.T)
    roots = values[:rank].sqrt()
    factors = Factors(
        (roots[:, None] * v[: len(roots)] @ right.T).float(), (left @ (u[:, : len(roots)] * roots)).float()
    )
    squares = values.square()
    return factors, Loss(float(squares[rank:].sum()), float(squares.sum()))


class Workspace:
    """Float32 memory for the sums of one piece of a weight, used again for the next: fresh memory takes as long."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """Memory for a tensor, with whatever was there."""
        count = math.prod(shape)
        if name not in self._held or len(self._held[name]) < count:
            self._held[name] = torch.empty(count)
        return self._held[name][:count].view(*shape)


def merge_rows(weight: Tensor, up: Tensor, down: Tensor, dtype: torch.dtype, space: Workspace) -> tuple[Tensor, float]:
    """W + up @ down in float32, rounded once to `dtype`, and the square of what the rounding loses of the change.

    Where W itself does not fit in `dtype`, what that loses is not the change's loss: it would be lost without it.

    Args:
        weight: `[rows, columns]`, all rows of W or some, in any floating-point format.
        up: the same rows of B, `[rows, rank]`.
    """
    exact = space.take("exact", weight.shape).copy_(weight).addmm_(up, down)
    merged = exact.to(dtype, copy=True)
    lost = space.take("lost", weight.shape).copy_(merged).sub_(exact)
    if weight.itemsize > merged.itemsize:
        lost.sub_(weight.to(dtype).float() - weight.float())
    return merged, sum_of_squares(lost)


def sum_of_squares(tensor: Tensor) -> float:
    """Of a float32 tensor: in float32 for a number of elements, in float64 beyond, and where squares are too large."""
    flat = tensor.reshape(-1)
    total = 0.0
    for begin in range(0, len(flat), SUMMED_AT_ONCE):
        piece = flat[begin : begin + SUMMED_AT_ONCE]
        squares = float(torch.dot(piece, piece))
        total += squares if math.isfinite(squares) else float(piece.double().square().sum())
    return total


def read_factors(file: LoraFile, stream: Any, module: str, shape: Sequence[int]) -> Factors:
    """The change of a documented module's weight of this shape, put together from what the file has of it.

    Parts that share their A keep it once; others stand below each other, in rows and columns of their own.

    Raises:
        DiffSynthError: when a value is not finite.
    """
    weight, parts = f"{module}.weight", file.modules[module]
    downs: list[Tensor] = []
    columns: dict[str, slice] = {}
    for name, part in parts.items():
        down = finite(stream.get_tensor(part.keys.down).float().flatten(1), file.path, part.keys.down)
        begin = 0
        for known in downs:
            if known.equal(down):
                break
            begin += len(known)
        else:
            downs.append(down)
        columns[name] = slice(begin, begin + len(down))
    rank = sum(map(len, downs))
    ups = {}
    for name, part_shape in file.names.cut_shape(weight, tuple(shape)).items():
        ups[name] = torch.zeros(part_shape[0], rank)
        if name in parts:
            ups[name][:, columns[name]] = _read_up(file, stream, parts[name])
    return Factors(torch.cat(downs), file.names.join(weight, ups).flatten(1))


def _read_up(file: LoraFile, stream: Any, part: LoraPart) -> Tensor:
    return finite(read_scaled_up(stream, part).flatten(1), file.path, part.keys.up)


def finite(tensor: Tensor, path: Path, key: str | None) -> Tensor:
    """A tensor of a file, when all of it is finite.

    Raises:
        DiffSynthError: when it is not.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise DiffSynthError(
            f"`{path}`: `{key}` holds values that are no finite numbers", "name a file of an earlier step"
        )
    return tensor


class LoraChanges:
    """What a LoRA file adds to the weights of a module in memory, computed weight by weight.

    Parts of a documented module may have LoRAs of their own, or none.

    Args:
        shapes: weight shapes by documented module.
        documented: documented names -> names in the module.
    """

    def __init__(self, file: LoraFile, stream: Any, shapes: Mapping[str, tuple[int, ...]], documented: KeyMap) -> None:
        self._file, self._stream, self._shapes, self._documented = file, stream, shapes, documented

    def of(self, name: str) -> Factors | None:
        """D of a weight, by its name in the module, as a product; None where the file has none."""
        weight = self._documented.theirs(name)
        module = (weight or "").removesuffix(".weight")
        if weight is None or weight == module or module not in self._file.modules:
            return None
        whole = read_factors(self._file, self._stream, module, self._shapes[module])
        return Factors(whole.down, self._documented.cut(weight, whole.up)[name].flatten(1))


@contextmanager
def open_changes(file: LoraFile, shapes: Mapping[str, tuple[int, ...]], documented: KeyMap) -> Iterator[LoraChanges]:
    """The changes of a LoRA file, which stays open meanwhile."""
    from safetensors import safe_open

    with safe_open(file.path, framework="pt", device="cpu") as stream:
        yield LoraChanges(file, stream, shapes, documented)

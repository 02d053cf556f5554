"""LoRA merged into its base: W' = W + sum of (alpha / rank) B A (Hu et al. 2021, arXiv:2106.09685).

Computed in float32 and rounded once, into the dtype of the merged weight.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsynth_core.adapters.changes import Factors

MAX_SILENT_ERROR = 0.1
"""Share of a change that rounding may lose in silence."""
SUMMED_AT_ONCE = 2**20
"""Squares added up in float32; their sums are added in float64."""


@dataclass
class RelativeError:
    """How much of changes is lost: ||D' - D|| / ||D|| over all weights, D being what was asked for, D' what came of it.

    Rounding to bfloat16 loses a third of a change of spread 1e-4 on weights of spread 0.02.
    """

    lost_squared: float = 0.0
    asked_squared: float = 0.0

    def add(self, other: "RelativeError") -> None:
        """Take in the weights of another."""
        self.lost_squared += other.lost_squared
        self.asked_squared += other.asked_squared

    @property
    def share(self) -> float:
        """0 where nothing is lost, and where nothing was asked for."""
        return (self.lost_squared / self.asked_squared) ** 0.5 if self.asked_squared else 0.0


def truncate(change: Factors, rank: int) -> tuple[Factors, RelativeError]:
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
    return factors, RelativeError(float(squares[rank:].sum()), float(squares.sum()))


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


def merge_rows(
    weight: Tensor, change: Factors, dtype: torch.dtype, space: Workspace, begin: int = 0
) -> tuple[Tensor, float]:
    """W + change in float32, rounded once to `dtype`, and the square of what the rounding loses of the change.

    Where W itself does not fit in `dtype`, what that loses is not the change's loss: it would be lost without it.

    Args:
        weight: `[rows, columns]`, all rows of W or some, from `begin` on, in any floating-point format.
        change: of all rows.
    """
    end = begin + len(weight)
    exact = space.take("exact", weight.shape).copy_(weight).addmm_(change.up[begin:end], change.down)
    for difference, scale in change.differences:
        exact.add_(difference[begin:end], alpha=scale)
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

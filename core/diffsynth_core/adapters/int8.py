"""Weights as 8-bit integers with a scale for each row."""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffsynth_core.adapters.float8 import row_scales, scale_rows
from diffsynth_core.adapters.stored import WeightFormat

LARGEST = 127
"""Of the stored integers; -128 is not used, so that a row and its negative are stored alike."""


class Int8Format(WeightFormat):
    """Weights divided by a scale for each row, with which its largest becomes 127, and then rounded.

    `stored`: `[out, in]` int8. `scale`: `[out, 1]` float32.
    """

    names = ("stored", "scale")

    def empty(self, rows: int, columns: int, dtype: torch.dtype) -> Mapping[str, Tensor]:
        return {
            "stored": torch.empty(rows, columns, dtype=torch.int8, device="meta"),
            "scale": torch.empty(rows, 1, dtype=torch.float32, device="meta"),
        }

    def pack(self, weight: Tensor, scale: Tensor | None = None) -> Mapping[str, Tensor] | None:
        weight = weight.to(torch.float32)
        scale = row_scales(weight, LARGEST)
        if not scale.isfinite().all():
            return None
        return {"stored": (weight / scale).round_().to(torch.int8), "scale": scale}

    def widen(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return scale_rows(tensors["stored"], tensors["scale"], dtype)

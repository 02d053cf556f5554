"""Weights in 8-bit floats (e4m3), rounded as they are or with a scale for each row.

Numbers of e4m3 are 2^-9 apart below 2^-6, and 1/8 to 1/16 of their value above; the largest is 448, and larger ones
would become NaN. The weights of a network are small, so that without a scale many of them fall where the numbers are
far apart beside them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffsynth_core.adapters.stored import WeightFormat

FLOAT8 = torch.float8_e4m3fn
"""Dtype of the stored weights."""
LARGEST = torch.finfo(FLOAT8).max
"""448."""


class Float8Format(WeightFormat):
    """Weights rounded to the nearest representable number, without a scale. Weights of files that are in this dtype
    with a scale for each row keep both: nothing is rounded.

    `stored`: bytes of the weight, `[out, in]` uint8 rather than float8: a module's dtype is that of its floating-point
    parameters, and processes can communicate uint8. `scale`: factor of each row, `[out, 1]` float32; absent for weights
    that were rounded here.
    """

    names = ("stored", "scale")

    def empty(self, rows: int, columns: int, dtype: torch.dtype) -> Mapping[str, Tensor]:
        return {"stored": torch.empty(rows, columns, dtype=torch.uint8, device="meta")}

    def pack(self, weight: Tensor, scale: Tensor | None = None) -> Mapping[str, Tensor] | None:
        if scale is not None:
            return {"stored": to_bytes(weight), "scale": scale.clone()}
        return {"stored": to_bytes(weight)} if fits(weight) else None

    def widen(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        narrow, scale = tensors["stored"].view(FLOAT8), tensors.get("scale")
        return narrow.to(dtype) if scale is None else scale_rows(narrow, scale, dtype)

    def keeps_scale(self, stored: torch.dtype) -> bool:
        return stored == FLOAT8


class ScaledFloat8Format(Float8Format):
    """Weights divided by a scale for each row, with which its largest becomes 448, and then rounded; those of files
    that are in this dtype are not rounded again.
    """

    def empty(self, rows: int, columns: int, dtype: torch.dtype) -> Mapping[str, Tensor]:
        scale = torch.empty(rows, 1, dtype=torch.float32, device="meta")
        return {**super().empty(rows, columns, dtype), "scale": scale}

    def pack(self, weight: Tensor, scale: Tensor | None = None) -> Mapping[str, Tensor] | None:
        if scale is None and weight.dtype == FLOAT8:
            scale = torch.ones(len(weight), 1, device=weight.device) if fits(weight) else None
            return None if scale is None else super().pack(weight, scale)
        if scale is None:
            weight = weight.to(torch.float32)
            scale = row_scales(weight, LARGEST)
            if not scale.isfinite().all():
                return None
            weight = weight / scale
        return super().pack(weight, scale)


def row_scales(weight: Tensor, largest: float) -> Tensor:
    """Return the factor of each row, `[out, 1]` float32, with which `largest` stands for its largest element.

    It is 1 for a row of zeros. Not finite for a row with an element that is not.
    """
    scale = weight.abs().amax(1, keepdim=True).to(torch.float32) / largest
    # A scale below the smallest normal number would lose digits of its own, and the row with it.
    return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)


def scale_rows(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return stored x scale, multiplied in float32 and rounded once to `dtype`."""
    # bfloat16 has all numbers of e4m3, with which few operations are defined; nothing is written in float32.
    exact = stored.to(torch.bfloat16) if stored.dtype == FLOAT8 else stored
    return torch.mul(exact, scale, out=torch.empty(stored.shape, dtype=dtype, device=stored.device))


def to_bytes(weight: Tensor) -> Tensor:
    """Round a weight for which `fits` holds to 8-bit floats; returns their bytes, uint8, in new memory."""
    return weight.to(FLOAT8, copy=True).view(torch.uint8)


def fits(weight: Tensor) -> bool:
    """Return whether all elements are within the range of 8-bit floats."""
    low, high = (weight.float() if weight.itemsize == 1 else weight).aminmax()
    return bool(low >= -LARGEST) and bool(high <= LARGEST)

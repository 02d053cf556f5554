"""Weights in 4-bit NormalFloat with double quantization (Dettmers et al. 2023, arXiv:2305.14314), by bitsandbytes.

Each run of 64 weights has a scale, its largest magnitude, and each weight is one of 16 values of the scale: the
quantiles of a normal distribution. The scales, less their mean, are 8-bit numbers in runs of 256 that have a scale
each: 4 + 8/64 + 32/(64 · 256) = 4.127 bits per weight.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from diffsynth_core.adapters.stored import WeightFormat

BLOCK = 64
"""Weights that share a scale."""
SCALES_BLOCK = 256
"""Scales that share a scale: constant in `quantize_4bit`."""


class Nf4Format(WeightFormat):
    """Weights in 4-bit NormalFloat with double quantization.

    `stored`: two weights in a byte, `[out, in / 2]` uint8. `absmax`: their quantized scales, `[blocks]` uint8;
    `nested_absmax`: the scales of these, float32; `offset`: the mean of the scales, a float32 number.
    """

    names = ("stored", "absmax", "nested_absmax", "offset")

    def empty(self, rows: int, columns: int, dtype: torch.dtype) -> Mapping[str, Tensor]:
        blocks = -(-rows * columns // BLOCK)
        shapes = {"stored": (rows, columns // 2), "absmax": (blocks,)}
        wide = {"nested_absmax": (-(-blocks // SCALES_BLOCK),), "offset": ()}
        packed = {name: torch.empty(shape, dtype=torch.uint8, device="meta") for name, shape in shapes.items()}
        return packed | {name: torch.empty(shape, device="meta") for name, shape in wide.items()}

    def pack(self, weight: Tensor, scale: Tensor | None = None) -> Mapping[str, Tensor] | None:
        from bitsandbytes.functional import quantize_4bit

        # A byte would hold weights of two rows, and not every widened shape could be told from the stored one.
        if weight.shape[1] % 2:
            return None
        taken = weight if weight.dtype in (torch.float32, torch.bfloat16, torch.float16) else weight.to(torch.float32)
        if not taken.isfinite().all():
            return None
        packed, state = quantize_4bit(taken.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        return {
            "stored": packed.view(len(weight), -1),
            "absmax": state.absmax,
            "nested_absmax": state.state2.absmax,
            "offset": state.offset,
        }

    def widen(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        stored = tensors["stored"]
        shape = torch.Size((len(stored), 2 * stored.shape[1]))
        if stored.is_meta:  # while memory is measured, without the package
            return torch.empty(shape, dtype=dtype, device="meta")
        from bitsandbytes.functional import QuantState, dequantize_4bit

        values, scale_values = _tables(stored.device)
        of_scales = QuantState(
            absmax=tensors["nested_absmax"], code=scale_values, blocksize=SCALES_BLOCK, dtype=torch.float32
        )
        state = QuantState(
            absmax=tensors["absmax"],
            shape=shape,
            code=values,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=tensors["offset"],
            state2=of_scales,
        )
        wide: Tensor = dequantize_4bit(stored.view(-1, 1), state)
        return wide


@cache
def _tables(device: torch.device) -> tuple[Any, Any]:
    """Return the values of the 4-bit numbers, and of the 8-bit numbers of scales, on a device."""
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    return get_4bit_type("nf4", device=device), create_dynamic_map().to(device)

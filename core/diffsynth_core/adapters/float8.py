"""Frozen weights stored in 8-bit floats (e4m3) and dequantized for each computation.

This applies to the weights of linear layers in numbered blocks: nearly all bytes of a network. Layers before and after
the blocks (embedders of pixels, time and text, shared modulation, the last projection) keep their dtype, because
everything passes through these few layers and an error there reaches every block; so do biases, norms, tables,
embeddings and convolutions, which are small, or are added or looked up without a sum that averages rounding errors.

A weight is rounded to the nearest representable number, without a scale. Numbers of e4m3 are 2^-9 apart below 2^-6,
and 1/8 to 1/16 of their value above; the largest is 448, and larger ones would become NaN. Weights of files that are
in this dtype with a scale for each row keep both: nothing is rounded.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

FLOAT8 = torch.float8_e4m3fn
"""Dtype of the stored weights."""
LARGEST = torch.finfo(FLOAT8).max
"""448."""


class _LinearOfStored(torch.autograd.Function):
    """y = x W^T + b that saves the stored bytes of W for the backward pass and dequantizes them again there.

    Freeing the dequantized weight after the forward pass would leave nothing for the backward pass, and letting
    autograd save it would use the memory that the storage is meant to save. W and b are frozen: only x gets a
    gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stored: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(stored, scale)
        ctx.input_dtype = x.dtype
        return functional.linear(x, widen(stored, dtype, scale), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (stored, scale), (gradient,) = ctx.saved_tensors, gradients
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        wide = widen(stored, gradient.dtype, scale)
        return gradient.matmul(wide).to(ctx.input_dtype), None, None, None, None


def widen(stored: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """Dequantize 8-bit floats: convert to another dtype, and multiply each row by its scale `[out, 1]` in float32."""
    narrow = stored.view(FLOAT8)
    return narrow.to(dtype) if scale is None else narrow.to(torch.float32).mul_(scale).to(dtype)


class Float8Linear(nn.Linear):
    """A frozen linear layer that stores its weight in 8-bit floats.

    Attributes:
        stored: bytes of the weight, `[out, in]` uint8 rather than float8: a module's dtype is that of its
            floating-point parameters, which must be the compute dtype, and processes can communicate uint8.
        scale: factor of each row, `[out, 1]` float32; None for weights that were rounded here.
        compute_dtype: dtype of the computation; under autocast that of autocast, as for any linear layer.
    """

    scale: Tensor | None

    def __init__(
        self, layer: nn.Linear, weight: Tensor, compute_dtype: torch.dtype, scale: Tensor | None = None
    ) -> None:
        """Replace a layer: with its sizes and bias, and a weight for which `fits` holds."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.compute_dtype = compute_dtype
        self.stored = nn.Parameter(to_bytes(weight), requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias = layer.bias
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A dequantized copy of the weight, `[out, in]`; writing to it has no effect."""
        return widen(self.stored, self.compute_dtype, self.scale)

    def forward(self, input: Tensor) -> Tensor:
        return _LinearOfStored.apply(input, self.stored, self.scale, self.bias, self.compute_dtype)  # type: ignore[no-untyped-call,no-any-return]


def to_bytes(weight: Tensor) -> Tensor:
    """Round a weight for which `fits` holds to 8-bit floats; returns their bytes, uint8, in new memory."""
    return weight.to(FLOAT8, copy=True).view(torch.uint8)


def float8_layers(model: nn.Module) -> frozenset[str]:
    """Return the names of the linear layers whose weights can be stored in 8-bit floats.

    Layers that share their weight with another module, such as an embedding, are excluded.
    """
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return frozenset(
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.startswith(blocks) and owners[id(module.weight)] == 1
    )


def fits(weight: Tensor) -> bool:
    """Return whether all elements are within the range of 8-bit floats."""
    low, high = (weight.float() if weight.itemsize == 1 else weight).aminmax()
    return bool(low >= -LARGEST) and bool(high <= LARGEST)

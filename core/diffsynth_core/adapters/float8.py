"""Frozen weights that are stored in 8-bit floats (e4m3) and computed with in a wider dtype.

Stored so are the weights of linear layers inside the numbered blocks of a network: nearly all of its bytes. What stands
before and behind the blocks (embedders of pixels, time and text, shared modulation, the last projection) stays as it
is, for everything passes through these few layers and an error there reaches every block; so do biases, norms, tables,
embeddings and convolutions, which are small, or are added or looked up without a sum that evens rounding out.

A weight is rounded to the nearest number of the format and has no scale. Numbers of e4m3 are 2^-9 apart below 2^-6 and
1/8 to 1/16 of themselves above; the largest is 448, and what is larger would become no number at all. Weights that come
in this format with a scale for each row keep both: nothing is rounded.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
"""448."""


class _LinearOfStored(torch.autograd.Function):
    """y = x W^T + b, of which the backward pass keeps the bytes of W: it widens them once more.

    A layer that lends its wide weight to the forward pass and takes it away again has none to go back with, or lets
    autograd keep it, which is the memory that was to be saved. W and b are frozen: only x gets a gradient.
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
    """The bytes of 8-bit floats as numbers of another format, each row times its scale `[out, 1]` in float32."""
    narrow = stored.view(FLOAT8)
    return narrow.to(dtype) if scale is None else narrow.to(torch.float32).mul_(scale).to(dtype)


class Float8Linear(nn.Linear):
    """A frozen linear layer that stores its weight in 8-bit floats.

    `stored` is the weight's bytes, `[out, in]` uint8: a model asked for its dtype looks at its floating-point
    parameters and must find the one it computes in, and processes can send each other bytes whatever they stand for.
    `scale` is what each row of them is multiplied by, `[out, 1]` float32; None for weights that were rounded here.
    `compute_dtype` is that format; under autocast it is autocast's, as for any linear layer.
    """

    scale: Tensor | None

    def __init__(
        self, layer: nn.Linear, weight: Tensor, compute_dtype: torch.dtype, scale: Tensor | None = None
    ) -> None:
        """Take a layer's place: its sizes and its bias, and a weight for which `fits` holds."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.compute_dtype = compute_dtype
        self.stored = nn.Parameter(weight.to(FLOAT8, copy=True).view(torch.uint8), requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias = layer.bias
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A wide copy of the weight, `[out, in]`: to look at, for what is written to it is lost."""
        return widen(self.stored, self.compute_dtype, self.scale)

    def forward(self, input: Tensor) -> Tensor:
        return _LinearOfStored.apply(input, self.stored, self.scale, self.bias, self.compute_dtype)  # type: ignore[no-untyped-call,no-any-return]


def float8_layers(model: nn.Module) -> frozenset[str]:
    """Names of the linear layers whose weights are to be stored in 8-bit floats.

    Not those whose weight is also another module's, such as a table of embeddings.
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
    """Whether every element becomes a number in 8-bit floats."""
    low, high = (weight.float() if weight.itemsize == 1 else weight).aminmax()
    return bool(low >= -LARGEST) and bool(high <= LARGEST)

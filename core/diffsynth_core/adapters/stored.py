"""Frozen linear layers whose weights are kept in a format of their own and widened for each computation.

This applies to the weights of linear layers in numbered blocks: nearly all bytes of a network. Layers before and after
the blocks (embedders of pixels, time and text, shared modulation, the last projection) keep their dtype, because
everything passes through these few layers and an error there reaches every block; so do biases, norms, tables,
embeddings and convolutions, which are small, or are added or looked up without a sum that averages rounding errors.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


class WeightFormat(ABC):
    """How a weight `[out, in]` is kept: as which tensors, and what they mean. It has no state.

    Attributes:
        names: of the tensors. The first one becomes a parameter of the layer, and so do others of integers, which
            DDP would broadcast before each forward pass if they were buffers. Other floating-point ones become
            buffers: a module's dtype is that of its floating-point parameters, which must be the compute dtype.
    """

    names: tuple[str, ...] = ("stored",)

    @abstractmethod
    def empty(self, rows: int, columns: int, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Return the tensors of a weight `[rows, columns]` on the meta device, without those that it may lack.

        Args:
            dtype: of the computation.
        """

    @abstractmethod
    def pack(self, weight: Tensor, scale: Tensor | None = None) -> Mapping[str, Tensor] | None:
        """Return the tensors that keep a weight, in new memory on its device; None if the format cannot keep it.

        Args:
            weight: `[out, in]`, of any floating-point dtype.
            scale: factor of each row, `[out, 1]` float32, of weights for which `keeps_scale` holds; else None.
        """

    @abstractmethod
    def widen(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the weight that the tensors keep, `[out, in]` in a floating-point dtype, on their device."""

    def keeps_scale(self, stored: torch.dtype) -> bool:
        """Return whether weights that files store in a dtype, with a scale for each row, are kept without change."""
        return False


class PlainFormat(WeightFormat):
    """The weight itself, in the dtype in which it is packed."""

    def empty(self, rows: int, columns: int, dtype: torch.dtype) -> Mapping[str, Tensor]:
        return {"stored": torch.empty(rows, columns, dtype=dtype, device="meta")}

    def pack(self, weight: Tensor, scale: Tensor | None = None) -> Mapping[str, Tensor]:
        return {"stored": weight.clone()}

    def widen(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return tensors["stored"].to(dtype)


class _LinearOfStored(torch.autograd.Function):
    """y = x W^T + b that fetches and widens W in the forward pass, and again in the backward pass.

    Freeing the wide weight after the forward pass would leave nothing for the backward pass, and letting autograd save
    it would use the memory that the storage is meant to save. The layer itself is kept, not its tensors, so that they
    need not stay on the device in between. W and b are frozen: only x gets a gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "StoredLinear") -> Tensor:
        ctx.layer, ctx.input_dtype = layer, x.dtype
        return functional.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        (gradient,) = gradients
        if not ctx.needs_input_grad[0]:
            return None, None
        wide = ctx.layer.widen(gradient.dtype)
        return gradient.matmul(wide).to(ctx.input_dtype), None


class WeightSource(Protocol):
    """Where weights wait that are not on the device."""

    def fetch(self, layer: "StoredLinear") -> Mapping[str, Tensor]:
        """Return the tensors that keep the weight of a layer, on the device of the computation."""


class StoredLinear(nn.Linear):
    """A frozen linear layer that keeps its weight in a format, as tensors named by the format.

    Attributes:
        format: of the weight.
        source: where the weight waits; None: its tensors are a parameter and buffers of the layer.
        compute_dtype: dtype of the computation; under autocast that of autocast, as for any linear layer.
    """

    def __init__(
        self,
        layer: nn.Linear,
        format: WeightFormat,
        compute_dtype: torch.dtype,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Replace a layer: with its sizes and bias.

        Args:
            tensors: those that the format packed; None: on the meta device.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.format, self.compute_dtype = format, compute_dtype
        self.source: WeightSource | None = None
        if tensors is None:
            tensors = format.empty(layer.out_features, layer.in_features, compute_dtype)
        for name in format.names:
            tensor = tensors.get(name)
            if tensor is None or (name != format.names[0] and tensor.is_floating_point()):
                self.register_buffer(name, tensor, persistent=False)
            else:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.bias = layer.bias
        self.train(layer.training)

    def fetch_from(self, source: WeightSource) -> None:
        """Have the weight wait elsewhere. Its tensors are neither parameter nor buffer from now on, which processes
        would communicate, and a module would move to the device.
        """
        for name in self.format.names:
            delattr(self, name)
        self.source = source

    def fetch(self) -> Mapping[str, Tensor]:
        """Return the tensors that keep the weight, on the device of the computation."""
        if self.source is not None:
            return self.source.fetch(self)
        found = {name: getattr(self, name) for name in self.format.names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def widen(self, dtype: torch.dtype) -> Tensor:
        """Return a copy of the weight in a dtype, `[out, in]` (or, of a plain weight in that dtype, the weight)."""
        return self.format.widen(self.fetch(), dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight in the compute dtype, `[out, in]`; not to be written to."""
        return self.widen(self.compute_dtype)

    def forward(self, input: Tensor) -> Tensor:
        return _LinearOfStored.apply(input, self)  # type: ignore[no-untyped-call,no-any-return]


def layers_in_blocks(model: nn.Module) -> frozenset[str]:
    """Return the names of the linear layers whose weights can be kept in a format.

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

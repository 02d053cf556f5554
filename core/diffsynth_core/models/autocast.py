"""Autocast, fused norms and fused attention for tensors on the meta device, as far as they change what autograd keeps.

PyTorch has no autocast for that device, and computes norms and attention there step by step. A forward pass on it,
within `Autocast`, keeps what it would keep on the device that is named, so that a machine without a GPU can tell.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map  # no public module has it

LOW_PRECISION = frozenset(
    (
        *("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        *("matmul", "__matmul__", "__rmatmul__", "mm", "mv", "bmm", "addmm", "addmv", "addr", "addbmm", "baddbmm"),
        *("einsum", "linalg_vecdot", "multi_dot", "chain_matmul", "scaled_dot_product_attention", "prelu"),
    )
)
"""Functions that autocast computes in its own dtype. Source: aten/src/ATen/autocast_mode.h,
`AT_FORALL_LOWER_PRECISION_FP`; the list of the CPU in autocast_mode.cpp (`KERNEL_CPU`) has all that occur here."""
FLOAT32 = {
    "cpu": frozenset(("mse_loss", "prod", "cdist", "interpolate")),
    "cuda": frozenset(
        (
            *("layer_norm", "group_norm", "rms_norm", "norm", "softplus", "softmax", "log_softmax", "logsumexp"),
            *("exp", "expm1", "log", "log10", "log2", "log1p", "pow", "__pow__", "__rpow__", "reciprocal", "rsqrt"),
            *("acos", "asin", "cosh", "erfinv", "sinh", "tan", "cumprod", "cumsum", "prod", "sum", "dist", "cdist"),
            *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "nll_loss", "kl_div", "cosine_similarity"),
            *("renorm", "vector_norm", "matrix_norm", "interpolate"),
        )
    ),
}
"""Functions that it computes in float32, by device. Source: the same files, `AT_FORALL_FP32` and
`AT_FORALL_FP32_SET_OPT_DTYPE`."""
CASTABLE = (torch.bfloat16, torch.float16, torch.float32)


class _RmsNorm(torch.autograd.Function):
    """What the fused kernel of GPUs keeps: its input, its weight, and a float32 number for each row."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor | None, axes: int) -> Tensor:
        rows = states.new_empty((*states.shape[:-axes], *[1] * axes), dtype=torch.float32)
        ctx.save_for_backward(states, weight, rows)
        return torch.empty_like(states)


class _Attention(torch.autograd.Function):
    """What fused kernels keep, on CPUs and GPUs: their inputs, their output, and a float32 number for each query.

    The output has the heads next to each other in memory, so that the model joins them without a copy.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, heads, length, _ = query.shape
        result = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, result, sums)
        ctx.mark_non_differentiable(sums)
        return result, sums


class Autocast(TorchFunctionMode):
    """Within it, tensors on the meta device are computed with as on `device` (cpu or cuda).

    For forward passes alone: what it returns has no gradients.

    Args:
        dtype: of autocast; None: autocast is off.
        keeps_attention: whether to keep what attention returns.

    Attributes:
        attention: of each call, if kept: what it returned, and its float32 number for each query.
    """

    def __init__(self, device: str, dtype: torch.dtype | None, keeps_attention: bool = False) -> None:
        super().__init__()
        self._dtype, self._fused = dtype, device != "cpu"
        self._low = LOW_PRECISION if dtype else frozenset[str]()
        self._float32 = FLOAT32[device] if dtype else frozenset[str]()
        self._weights: dict[Tensor, Tensor] = {}
        self._keeps_attention = keeps_attention
        self.attention: list[tuple[Tensor, Tensor]] = []

    @property
    def weight_bytes(self) -> int:
        """Of the copies of weights that autocast keeps until it ends: those of leaves that take gradients."""
        return sum(weight.nbytes for weight in self._weights.values())

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name == "__bool__" and args[0].is_meta:
            return True  # transformers asks whether all tokens count, and whether they are of one text
        if name in self._low:
            args, kwargs = tree_map(self._lower, (tuple(args), kwargs))
        elif name in self._float32:
            args, kwargs = tree_map(_raise, (tuple(args), kwargs))
        if name == "scaled_dot_product_attention":
            result, sums = _attention(*args, **kwargs)
            if self._keeps_attention:
                self.attention.append((result, sums))
            return result
        if name == "rms_norm" and self._fused:
            return _rms_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _lower(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype not in CASTABLE or value.dtype == self._dtype:
            return value
        if not (value.is_leaf and value.requires_grad and value.dtype == torch.float32):
            return value.to(self._dtype)
        if value not in self._weights:
            self._weights[value] = value.to(self._dtype)
        return self._weights[value]


def _raise(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in CASTABLE else value


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    return _Attention.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call,no-any-return]


def _rms_norm(states: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Fused where GPUs fuse it: not where input and weight differ in dtype."""
    if weight is not None and weight.dtype != states.dtype:
        return functional.rms_norm(states, shape, weight, eps)
    return _RmsNorm.apply(states, weight, len(shape))  # type: ignore[no-untyped-call,no-any-return]

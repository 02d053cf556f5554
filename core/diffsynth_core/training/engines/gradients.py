"""The norm of gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """Return the norm of all gradients together, computed in float32: a scalar on their device."""
    if any(gradient.dtype != torch.float32 for gradient in gradients):  # of bfloat16 it would be in bfloat16
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    else:
        norm = torch.nn.utils.get_total_norm(gradients)
    return norm

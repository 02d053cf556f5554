"""Table of the losses: what an error costs, element by element, and its mean over a sample."""

from collections.abc import Callable

from torch import Tensor

Loss = Callable[[Tensor], Tensor]
"""Error (prediction - target) of any shape, float32 -> loss of each element, in the same shape."""


def squared_error(error: Tensor) -> Tensor:
    """Return the squares of the error, whose mean is the mean squared error."""
    return error.pow(2)


LOSSES: dict[str, Loss] = {"mse": squared_error}
"""Name -> loss."""


def sample_means(values: Tensor, clean_mask: Tensor | None = None) -> Tensor:
    """Return the mean over the latents where `clean_mask`, which is broadcast, is not 1, per sample: `[B]`."""
    if clean_mask is None:
        return values.flatten(1).mean(1)
    counted = (1 - clean_mask.float()).expand_as(values)
    return (values * counted).flatten(1).sum(1) / counted.flatten(1).sum(1)

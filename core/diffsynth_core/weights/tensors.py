"""Reading the tensors of weight files one by one, in any format."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from diffsynth_core.files import PICKLED_SUFFIXES
from diffsynth_core.weights.base_files import Part, Scale, scale_grid
from diffsynth_core.weights.pickled import read_pickled


def iterate_tensors(path: Path, wanted: Callable[[str], bool] = lambda key: True) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of a file, on the CPU, reading each on demand, once it is found to be `wanted`."""
    from safetensors import safe_open

    if path.suffix in PICKLED_SUFFIXES:
        yield from ((key, tensor) for key, tensor in read_pickled(path).items() if wanted(key))
        return
    with safe_open(path, framework="pt", device="cpu") as stream:
        for key in stream.keys():  # noqa: SIM118 - not a mapping
            if wanted(key):
                yield key, stream.get_tensor(key)


def iterate_weights(
    part: Part, skipped: Callable[[str], bool] = lambda name: False
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yield names without the prefix, stored weights, and their scales (see `dequantize`).

    Args:
        skipped: called with each name in its turn; the weight is not read if it returns True.
    """
    scales = {name: read_scale(scale, part.tensors[name].shape) for name, scale in part.scales.items()}
    names = {part.prefix + name: name for name in part.tensors}
    for path in part.paths:
        for key, tensor in iterate_tensors(path, lambda key: key in names and not skipped(names[key])):
            yield names[key], tensor, scales.get(names[key])


def read_scale(scale: Scale, weight: tuple[int, ...]) -> Tensor:
    """Return a scale as float32 `[row blocks, column blocks]` of a weight of this shape."""
    grid = scale_grid(scale.header.shape, weight)
    assert grid, "checked when the header was read"
    (_, tensor), *_ = iterate_tensors(scale.header.path, scale.name.__eq__)
    return tensor.to(torch.float32).reshape(grid)


def dequantize(stored: Tensor, scale: Tensor, rows: int | None = None, begin: int = 0) -> Tensor:
    """Return a weight in float32: each block times its scale.

    `stored` may be a part of the weight: rows from `begin` of `rows` in total.
    """
    matrix = stored.to(torch.float32).flatten(1) if stored.ndim > 1 else stored.to(torch.float32)[:, None]
    height = (len(matrix) if rows is None else rows) // len(scale)
    of_rows = scale[torch.arange(begin, begin + len(matrix)) // height]
    matrix.view(len(matrix), of_rows.shape[1], -1).mul_(of_rows[:, :, None])
    return matrix.view(stored.shape)

"""Tensors of weight files one by one, whatever the format."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from diffsynth_core.state_dicts.pickled import PICKLED_ENDINGS, read_pickled


def iterate_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a file, on the CPU; each is read when it is asked for."""
    from safetensors import safe_open

    if path.suffix in PICKLED_ENDINGS:
        yield from read_pickled(path).items()
        return
    with safe_open(path, framework="pt", device="cpu") as stream:
        for key in stream.keys():  # noqa: SIM118 - not a mapping
            yield key, stream.get_tensor(key)

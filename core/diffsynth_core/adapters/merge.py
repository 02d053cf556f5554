"""A LoRA merged into its base: W' = W + (alpha / rank) B A (Hu et al. 2021, arXiv:2106.09685).

Computed in float32 and rounded once, into the number format of the merged weight.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffsynth_core.adapters.lora import read_scaled_up
from diffsynth_core.state_dicts.key_maps import KeyMap
from diffsynth_core.state_dicts.lora_files import LoraFile

LOSS_WORTH_A_WARNING = 0.1
"""Share of a change that rounding may lose in silence."""


def lora_change(down: Tensor, up: Tensor) -> Tensor:
    """B A in float32, in the shape of the weight that it changes.

    Args:
        down: A, `[rank, in]`, of a convolution `[rank, in, …kernel]`.
        up: B with its scale in it, `[out, rank]`, of a convolution `[out, rank, 1, …]`.
    """
    return (up.float().flatten(1) @ down.float().flatten(1)).reshape(len(up), *down.shape[1:])


def merge_change(weight: Tensor, change: Tensor, dtype: torch.dtype) -> Tensor:
    """W + D in float32, rounded once to `dtype`."""
    return (weight.float() + change).to(dtype)


@dataclass
class RoundingLoss:
    """How much of a change the rounding of merged weights loses: ||W' - W - D|| / ||D|| over all of them.

    With a delta of spread 1e-4 on bfloat16 weights of spread 0.02, that is a third.
    """

    lost_squared: float = 0.0
    asked_squared: float = 0.0

    def count(self, weight: Tensor, change: Tensor, merged: Tensor) -> None:
        """Take in one weight: before, the change asked for, and after, rounded."""
        lost = merged.float() - weight.float() - change
        self.lost_squared += float(lost.square().sum(dtype=torch.float64))
        self.asked_squared += float(change.square().sum(dtype=torch.float64))

    @property
    def share(self) -> float:
        """0 where nothing is lost, and where nothing was asked for."""
        return (self.lost_squared / self.asked_squared) ** 0.5 if self.asked_squared else 0.0


class LoraChanges:
    """What a LoRA file adds to the weights of a module in memory, computed weight by weight.

    Parts of a documented module may have LoRAs of their own, or none.

    Args:
        shapes: weight shapes by documented module.
        documented: documented names -> names in the module.
    """

    def __init__(self, file: LoraFile, stream: Any, shapes: Mapping[str, tuple[int, ...]], documented: KeyMap) -> None:
        self._file, self._stream, self._shapes, self._documented = file, stream, shapes, documented
        self._ready: dict[str, Tensor] = {}

    def of(self, name: str) -> Tensor | None:
        """D of a weight, by its name in the module, float32; None where the file has none.

        What is computed with it, the other parts of a documented module, waits until it is asked for or another one is.
        """
        if name in self._ready:
            return self._ready.pop(name)
        weight = self._documented.theirs(name)
        module = (weight or "").removesuffix(".weight")
        if weight is None or weight == module or module not in self._file.modules:
            return None
        whole = self._whole(module, weight)
        self._ready = dict(self._documented.cut(weight, whole))
        return self._ready.pop(name)

    def _whole(self, module: str, weight: str) -> Tensor:
        """D of a documented module's weight, put together from the parts that the file's dialect has of it."""
        parts = self._file.modules[module]
        changes = {}
        for name, shape in self._file.names.cut_shape(weight, self._shapes[module]).items():
            if name in parts:
                down = self._stream.get_tensor(parts[name].keys.down)
                changes[name] = lora_change(down, read_scaled_up(self._stream, parts[name]))
            else:
                changes[name] = torch.zeros(shape)
        whole: Tensor = self._file.names.join(weight, changes)
        return whole


@contextmanager
def open_changes(file: LoraFile, shapes: Mapping[str, tuple[int, ...]], documented: KeyMap) -> Iterator[LoraChanges]:
    """The changes of a LoRA file, which stays open meanwhile."""
    from safetensors import safe_open

    with safe_open(file.path, framework="pt", device="cpu") as stream:
        yield LoraChanges(file, stream, shapes, documented)

"""Weight stores: how the frozen weights of a component are kept. Their facts need no torch."""

import math
from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from diffsynth_core.adapters.stored import WeightFormat


class WeightStore:
    """Keeps every weight as it is in its layer: in float32 where it trains, else in the dtype of the run.

    Others put layers of their own in the place of linear layers.

    Attributes:
        title: of what it keeps weights as, in words.
        bytes_per_weight: in its own layers; None: none has any.
        bytes_per_row: beside that, of the rows of its own layers.
        left_out: modules that it puts no layers of its own in the place of, by name or the end of it.
        package: what must be installed for it, which is also the name of the extra that installs it.
        trains: whether a component kept so can train other than by a LoRA.
        rejects: which weights it cannot keep, in words.
    """

    title = "their dtype"
    bytes_per_weight: float | None = None
    bytes_per_row = 0
    left_out: tuple[str, ...] = ()
    package: str | None = None
    trains = True
    rejects = ""

    def takes(self, layer: str) -> bool:
        """Return whether a layer is none of those that are left out, by its name."""
        return not any(f".{layer}".endswith(f".{name}") for name in self.left_out)

    def nbytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of a weight `[out, in]` in a layer of its own."""
        return round(math.prod(shape) * (self.bytes_per_weight or 0)) + self.bytes_per_row * shape[0]

    def layers(self, module: "nn.Module") -> frozenset[str]:
        """Return the names of the linear layers of a module that it can put its own in the place of."""
        return frozenset()

    def empty_layer(self, layer: "nn.Linear", dtype: "torch.dtype") -> "nn.Linear":
        """Return its own layer, which computes in `dtype`, for a layer on the meta device; they share the bias."""
        return layer

    def pack(self, weight: "Tensor", scale: "Tensor | None" = None) -> "Mapping[str, Tensor] | None":
        """Return the tensors of its own layer for a weight, by name, in new memory; None if it cannot keep the weight,
        whose layer then stays as it was.

        Args:
            weight: `[out, in]`, of any floating-point dtype.
            scale: factor of each row, `[out, 1]` float32, of weights for which `keeps_scale` holds; else None.
        """
        return None

    def keeps_scale(self, stored: "torch.dtype") -> bool:
        """Return whether it keeps weights that files store in a dtype, with a scale for each row, without change."""
        return False


class FormatStore(WeightStore):
    """Keeps the weights of linear layers in blocks in a format (adapters/formats.py)."""

    trains = False  # formats are so coarse that most steps would not change a weight

    def __init__(
        self,
        format: str,
        title: str,
        *,
        bytes_per_weight: float,
        bytes_per_row: int = 0,
        rejects: str = "not finite",
        package: str | None = None,
    ) -> None:
        self._name, self.title = format, title
        self.bytes_per_weight, self.bytes_per_row = bytes_per_weight, bytes_per_row
        self.rejects, self.package = rejects, package

    @property
    def _format(self) -> "WeightFormat":
        from diffsynth_core.adapters.formats import FORMATS

        return FORMATS[self._name]

    def layers(self, module: "nn.Module") -> frozenset[str]:
        from diffsynth_core.adapters.stored import layers_in_blocks

        return layers_in_blocks(module)

    def empty_layer(self, layer: "nn.Linear", dtype: "torch.dtype") -> "nn.Linear":
        from diffsynth_core.adapters.stored import StoredLinear

        return StoredLinear(layer, self._format, dtype)

    def pack(self, weight: "Tensor", scale: "Tensor | None" = None) -> "Mapping[str, Tensor] | None":
        return self._format.pack(weight, scale)

    def keeps_scale(self, stored: "torch.dtype") -> bool:
        return self._format.keeps_scale(stored)


SCALE = 4
"""Bytes of the float32 scale of a row."""
STORES: dict[str, WeightStore] = {
    "plain": WeightStore(),
    "float8": FormatStore("float8", "8-bit floats", bytes_per_weight=1.0, rejects="outside ±448, the fp8 range"),
    "fp8": FormatStore("fp8", "8-bit floats with a scale per row", bytes_per_weight=1.0, bytes_per_row=SCALE),
    "int8": FormatStore("int8", "8-bit integers with a scale per row", bytes_per_weight=1.0, bytes_per_row=SCALE),
    "nf4": FormatStore(
        "nf4",
        "4-bit NormalFloat",
        bytes_per_weight=1 / 2 + 1 / 64 + 4 / (64 * 256),  # adapters/nf4.py
        rejects="not finite, or with an odd number of columns",
        package="bitsandbytes",
    ),
}
"""Name -> weight store."""


def find_store(storage: str) -> WeightStore:
    """Return the weight store of a component's storage: its name, or `NAME/MODULE,MODULE…` with the modules that are
    left out of it, by name or the end of it.
    """
    name, _, left_out = storage.partition("/")
    if not left_out:
        return STORES[name]
    store = copy(STORES[name])
    store.left_out = tuple(left_out.split(","))
    return store

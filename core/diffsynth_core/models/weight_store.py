"""Weight stores: how the frozen weights of a component are kept. Their facts need no torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from diffsynth_core.adapters.stored import WeightFormat


class WeightStore:
    """Keeps every weight as it is in its layer: in float32 where it trains, else in the dtype of the run.

    Others put layers of their own in the place of linear layers.

    Attributes:
        bytes_per_weight: in its own layers; None: none has any.
        trains: whether a component kept so can train other than by a LoRA.
        rejects: which weights it cannot keep, in words.
    """

    bytes_per_weight: float | None = None
    trains = True
    rejects = ""

    def layers(self, module: "nn.Module") -> frozenset[str]:
        """Return the names of the linear layers of a module that it puts its own in the place of."""
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

    def __init__(self, format: str, bytes_per_weight: float, rejects: str) -> None:
        self._name, self.bytes_per_weight, self.rejects = format, bytes_per_weight, rejects

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


STORES: dict[str, WeightStore] = {
    "plain": WeightStore(),
    "float8": FormatStore("float8", bytes_per_weight=1.0, rejects="outside ±448, the fp8 range"),
}
"""Name -> weight store."""

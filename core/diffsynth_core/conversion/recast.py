"""Full weights in another dtype, computed piece by piece while they are written.

Scaled fp8 is the format of ComfyUI: `<layer>.weight` in e4m3, `<layer>.scale_weight` in float32, so that the weight is
their product, and a tensor `scaled_fp8` that marks the file. Source: comfy/utils.py (`convert_old_quants`) of
Comfy-Org/ComfyUI. One scale per weight, for those who load it multiply by a single number.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from diffsynth_core.config.choices import SplitDtype
from diffsynth_core.conversion.row_spans import RowSpans
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.shapes import layers_of_blocks
from diffsynth_core.weights.dtypes import FLOATING_POINT, SAFETENSORS_NAMES, torch_dtype
from diffsynth_core.weights.weight_writer import OutputTensor

if TYPE_CHECKING:
    from torch import Tensor

ELEMENTS_AT_ONCE = 2**22
"""Elements that are in memory at once."""
FLOAT8 = "F8_E4M3"
LARGEST = 448.0
"""Of e4m3."""
MARKER = "scaled_fp8"
"""Name of the empty tensor that marks a file in scaled fp8."""


def recast(tensors: Mapping[str, RowSpans], dtype: SplitDtype) -> tuple[OutputTensor, ...]:
    """Return floating-point tensors in a dtype, others unchanged; in `fp8_scaled`, layers of blocks alone change.

    Raises:
        DiffSynthError: when it is written, if a number is not finite or exceeds the range of the dtype.
    """
    if dtype == "fp8_scaled":
        return _scaled(tensors)
    wanted = SAFETENSORS_NAMES[dtype]
    return tuple(
        OutputTensor(name, wanted, tensor.shape, _cast(name, tensor, wanted))
        if tensor.dtype in FLOATING_POINT and tensor.dtype != wanted
        else tensor.output(name)
        for name, tensor in tensors.items()
    )


def rounded_layers(tensors: Mapping[str, RowSpans]) -> list[str]:
    """Return the names of the layers that are stored in scaled fp8."""
    layers = layers_of_blocks({name: tensor.shape for name, tensor in tensors.items()})
    return [layer for layer in layers if tensors[f"{layer}.weight"].dtype in FLOATING_POINT]


def _scaled(tensors: Mapping[str, RowSpans]) -> tuple[OutputTensor, ...]:
    layers = {f"{layer}.weight": f"{layer}.scale_weight" for layer in rounded_layers(tensors)}
    written = [OutputTensor(MARKER, FLOAT8, (0,), ())] if layers else []
    for name, tensor in tensors.items():
        if name not in layers:
            written.append(tensor.output(name))
            continue
        scale = _Scale(name, tensor)
        written.append(OutputTensor(layers[name], "F32", (), scale.pieces))
        written.append(OutputTensor(name, FLOAT8, tensor.shape, _cast(name, tensor, FLOAT8, scale)))
    return tuple(written)


class _Scale:
    """The scale of a weight: its largest absolute value / 448, or 1 if all are 0. Read once, when it is asked for."""

    def __init__(self, name: str, tensor: RowSpans) -> None:
        self._name, self._tensor = name, tensor
        self._value: float | None = None

    def value(self) -> float:
        if self._value is None:
            largest = max((float(_finite(self._name, piece).abs().max()) for piece in _read(self._tensor)), default=0.0)
            self._value = _as_float32(largest / LARGEST) or 1.0
        return self._value

    def pieces(self) -> Iterator[memoryview]:
        import torch

        from diffsynth_core.conversion.merging import as_bytes

        yield as_bytes(torch.tensor([self.value()]))


def _cast(name: str, tensor: RowSpans, dtype: str, scale: _Scale | None = None) -> Callable[[], Iterator[memoryview]]:
    """Return what computes the bytes of a tensor in a dtype, divided by its scale."""

    def pieces() -> Iterator[memoryview]:
        from diffsynth_core.conversion.merging import as_bytes

        for piece in _read(tensor):
            numbers = piece if scale is None else (piece / scale.value()).clamp_(-LARGEST, LARGEST)
            result = numbers.to(torch_dtype(dtype))
            yield as_bytes(result if scale else _finite(name, result))

    return pieces


def _read(tensor: RowSpans) -> "Iterator[Tensor]":
    """Yield the elements of a tensor in order, in float32 or, of float64, in that."""
    import torch

    stored = torch_dtype(tensor.dtype)
    for span in tensor.spans:
        with span.path.open("rb") as stream:
            stream.seek(span.begin)
            left = span.end - span.begin
            while left:
                data = bytearray(stream.read(min(left, ELEMENTS_AT_ONCE * stored.itemsize)))
                if not data:
                    raise DiffSynthError(f"`{span.path}` was truncated while it was read", "download the file again")
                left -= len(data)
                piece = torch.frombuffer(data, dtype=stored)
                yield piece if stored == torch.float64 else piece.to(torch.float32)


def _finite(name: str, values: "Tensor") -> "Tensor":
    import torch

    if not bool(torch.isfinite(values).all()):
        raise DiffSynthError(
            f"`{name}` contains NaN or Inf, or numbers outside the range of {str(values.dtype).removeprefix('torch.')}",
            "use a wider `--dtype` such as `float32`, or check the checkpoint",
        )
    return values


def _as_float32(value: float) -> float:
    import torch

    return float(torch.tensor(value, dtype=torch.float32))

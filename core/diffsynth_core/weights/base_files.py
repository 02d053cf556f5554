"""Weight files of models: components separated by prefix, weights separated from tensors that describe their format.

Files of ComfyUI and its tools put several components into one file, each below a prefix, and store matrices as 8-bit
floats with a scale (W = stored x scale), in two spellings: `<layer>.scale_weight` with the marker `scaled_fp8`, and
`<layer>.weight_scale` with `<layer>.comfy_quant`. Sources: comfy/utils.py (`convert_old_quants`) and QUANTIZATION.md
of Comfy-Org/ComfyUI. transformers writes `<layer>.weight_scale_inv`, which is multiplied too, for blocks of 128 x 128
(integrations/finegrained_fp8.py). No torch.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth_core.errors import DiffSynthError, list_names
from diffsynth_core.files import PICKLED_SUFFIXES
from diffsynth_core.json_files import as_type, parse_json
from diffsynth_core.weights.headers import TensorHeader, read_header, read_headers
from diffsynth_core.weights.values import read_bytes
from diffsynth_core.weights.weight_sets import Span

FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
"""8-bit floating-point dtypes in safetensors."""
WEIGHT_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
"""Suffixes of scales, which follow the name of the layer as `.weight` does."""
QUANT_CONFIG = ".comfy_quant"
"""Suffix of the tensor with a layer's format as JSON."""
QUANT_METADATA = "_quantization_metadata"
"""Where files say how a layer is stored: a tensor of JSON bytes next to it, or the metadata of the file."""
FLOAT8_FORMATS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise", "float8_e4m3fn_blockwise")
"""Supported values of a layer's format."""
CHANGES_OF_BASIS = ("convrot", "hadamard", "pre_quant_scale")
"""Options of a layer's format with which its weight is more than stored value x scale."""

FLOAT8_MARKERS = ("scaled_fp8", "comfy_quant", "input_scale", "scale_input")
"""Last parts of the names of tensors that only mark weights as 8-bit floats, or scale activations for 8-bit products.

They have no meaning for dequantized weights.
"""
NOT_WEIGHTS = (*FLOAT8_MARKERS, "spiece_model", "tekken_model", "logit_scale", "position_ids")
"""Last parts of the names of tensors that no model computes with: tokenizers, which ComfyUI stores with their
encoders, and constants of CLIP's training.
"""
PROJECTIONS = ("text_projection.weight", "visual_projection.weight")
"""Suffixes of CLIP's projections, which are not used."""
QUANTIZED = (
    *("absmax", "quant_map", "SCB", "weight_format", "qweight", "qzeros", "wscales", "_weight_qdata"),
    *("nested_absmax", "nested_quant_map", "bitsandbytes__nf4", "bitsandbytes__fp4"),
    *("weight_scale_2", "pre_quant_scale", "weight_scalar", "weight_s_rel"),
)
"""Last parts of the names of tensors that accompany quantized weights: bitsandbytes, GPTQ, AWQ, SVDQuant, and
ComfyUI's 4-bit formats.
"""

_PREFIX = re.compile(
    r"model\.diffusion_model\.|diffusion_model\.|transformer\.|"
    r"text_encoders\.\w+\.transformer\.|text_encoders\.|text_encoder(_\d)?\.|"
    r"vae\.|first_stage_model\.|clip_vision\.|image_encoder\."
)
"""Prefixes of components in files of several components, or written by ComfyUI and diffusers' tools."""


@dataclass(frozen=True)
class Scale:
    """Scale of a stored weight; `name` in the files."""

    name: str
    header: TensorHeader


@dataclass(frozen=True)
class BaseTensors:
    """The weights in files by name, and their scales."""

    weights: Mapping[str, TensorHeader]
    scales: Mapping[str, Scale]


@dataclass(frozen=True)
class Part:
    """The tensors below one prefix in files: usually a component.

    Attributes:
        tensors: weights by name without the prefix.
        scales: their scales, by the same names.
    """

    prefix: str
    tensors: Mapping[str, TensorHeader]
    scales: Mapping[str, Scale]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weights and their scales."""
        scales = [scale.header for scale in self.scales.values()]
        return sum(tensor.nbytes for tensor in (*self.tensors.values(), *scales))

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that contain its weights."""
        return tuple(dict.fromkeys(tensor.path for tensor in self.tensors.values()))


def read_parts(paths: Sequence[Path], origin: str | None = None) -> list[Part]:
    """Return the parts of one model's files.

    Raises:
        DiffSynthError: see `read_headers` and `find_weights`.
    """
    origin = ", ".join(map(str, paths)) if origin is None else origin
    return parts_of(find_weights(origin, read_headers(paths)))


def find_weights(origin: str, tensors: Mapping[str, TensorHeader]) -> BaseTensors:
    """Separate weights from their scales and from other tensors.

    Raises:
        DiffSynthError: if weights are quantized in an unsupported way, or a scale fits no weight.
    """
    quantized = [name for name in tensors if name.rpartition(".")[2] in QUANTIZED]
    if quantized:
        raise _quantized(origin, quantized)
    scales: dict[str, Scale] = {}
    for name in tensors:
        ending = next((ending for ending in WEIGHT_SCALES if name.endswith(ending)), None)
        if ending is None:
            continue
        weight = name.removesuffix(ending) + ".weight"
        _check_scale(origin, weight, name, tensors)
        if weight in scales:
            raise DiffSynthError(
                f"`{origin}` has two scales for `{weight}`: `{scales[weight].name}` and `{name}`",
                "download the file again",
            )
        scales[weight] = Scale(name, tensors[name])
    if scales or any(name.endswith(QUANT_CONFIG) for name in tensors):
        _check_formats(origin, scales, tensors)
    left_out = {*(scale.name for scale in scales.values()), *filter(_is_no_weight, tensors)}
    return BaseTensors({name: tensor for name, tensor in tensors.items() if name not in left_out}, scales)


def parts_of(found: BaseTensors) -> list[Part]:
    """Group weights by prefix, in order of appearance; names without a known prefix form one group."""
    weights: dict[str, dict[str, TensorHeader]] = {}
    scales: dict[str, dict[str, Scale]] = {}
    for name, tensor in found.weights.items():
        match = _PREFIX.match(name)
        prefix = match[0] if match else ""
        weights.setdefault(prefix, {})[name.removeprefix(prefix)] = tensor
        if name in found.scales:
            scales.setdefault(prefix, {})[name.removeprefix(prefix)] = found.scales[name]
    return [Part(prefix, tensors, scales.get(prefix, {})) for prefix, tensors in weights.items()]


def scale_grid(scale: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the number of blocks of (rows, columns) into which a scale divides a weight `[rows, ...]`; None if it
    does not fit.

    One number is for the whole weight, `[rows]` and `[rows, 1]` for each row, `[row blocks, column blocks]` and
    `[rows, column blocks, 1]` (musubi-tuner) for each block.
    """
    sides = list(scale)
    while len(sides) > 2 and sides[-1] == 1:
        sides.pop()
    if all(side == 1 for side in sides):
        return 1, 1
    if not weight or len(sides) > 2:
        return None
    rows, columns = weight[0], math.prod(weight[1:])
    down, across = (*sides, 1) if len(sides) == 1 else sides
    if len(sides) == 1 and down != rows:
        return None
    return (down, across) if rows % down == 0 and columns % across == 0 else None


def is_float8_marker(name: str) -> bool:
    """Return whether a tensor has no meaning once no weight is stored in 8-bit floats."""
    return name.rpartition(".")[2] in FLOAT8_MARKERS


def _is_no_weight(name: str) -> bool:
    return name.rpartition(".")[2] in NOT_WEIGHTS or f".{name}".endswith(tuple(f".{end}" for end in PROJECTIONS))


def _check_scale(origin: str, weight: str, scale: str, tensors: Mapping[str, TensorHeader]) -> None:
    """Reject a scale without an 8-bit weight, and one with a shape that does not fit."""
    if weight not in tensors:
        raise DiffSynthError(
            f"`{origin}` has the scale `{scale}`, but no `{weight}`", "download the file again, or pass all its shards"
        )
    stored, by = tensors[weight], tensors[scale]
    if stored.dtype not in FLOAT8 or by.dtype not in ("F32", "F16", "BF16", "F64"):
        raise _quantized(origin, [scale], f"; `{weight}` is {stored.dtype}, its scale {by.dtype}")
    if scale_grid(by.shape, stored.shape) is None:
        raise DiffSynthError(
            f"`{origin}`: the scale `{scale}` of shape {list(by.shape)} does not match `{weight}` of shape {list(stored.shape)}",
            "use the original weights in bfloat16",
        )


def _quantized(origin: str, names: list[str], more: str = "") -> DiffSynthError:
    return DiffSynthError(
        f"`{origin}` contains quantized weights ({list_names(names, 1)}){more}: only scaled fp8 is supported",
        "use the original weights in bfloat16, or a file in scaled fp8",
    )


def _check_formats(origin: str, scales: Mapping[str, Scale], tensors: Mapping[str, TensorHeader]) -> None:
    """Reject layers whose metadata declares another format than stored value x scale."""
    layers = {weight.removesuffix(".weight"): tensors[weight].path for weight in scales}
    for path in dict.fromkeys(tensor.path for tensor in tensors.values()):
        for layer, config in _formats_in(path).items():
            config = {"format": config} if isinstance(config, str) else config
            stated = config.get("format") if isinstance(config, dict) else None
            transforms = [name for name in CHANGES_OF_BASIS if isinstance(config, dict) and config.get(name)]
            if stated not in FLOAT8_FORMATS or transforms:
                name = ", ".join([str(stated), *transforms])
                raise _quantized(origin, [f"{layer}{QUANT_CONFIG}"], f"; the format of this layer is `{name}`")
            if layer not in layers and f"{layer}.weight" in tensors:
                raise DiffSynthError(
                    f"`{origin}` declares `{layer}` as {stated} with a scale, but contains no scale for it",
                    "download the file again",
                )


def _formats_in(path: Path) -> dict[str, object]:
    """Return what a file declares about the formats of its layers."""
    if path.suffix in PICKLED_SUFFIXES:
        return {}
    header = read_header(path)
    found: dict[str, object] = {}
    try:
        if QUANT_METADATA in header.metadata:
            content = as_type(parse_json(header.metadata[QUANT_METADATA]), dict[str, Any])
            found |= as_type(content.get("layers"), dict[str, Any], "layers")
        for name in header.tensors:
            if name.endswith(QUANT_CONFIG):
                data = read_bytes(Span(path, *header.spans[name]))
                found[name.removesuffix(QUANT_CONFIG)] = parse_json(data.rstrip(b"\0").decode())
    except ValueError as error:  # neither UTF-8 nor JSON, or of another type
        raise DiffSynthError(
            f"`{path}`: cannot read the layer formats that it declares: {error}", "download the file again"
        ) from error
    return found

"""Reading LoRA files: their keys, shapes and scales, checked against the base if it is given. No torch.

Only headers and alphas are read.
"""

import math
import re
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth_core.errors import DiffSynthError, list_names
from diffsynth_core.json_files import InvalidJson, WrongType, as_type, parse_json, read_json
from diffsynth_core.progress import pluralize, verb
from diffsynth_core.weights.dtypes import FLOATING_POINT
from diffsynth_core.weights.headers import Header, TensorHeader, read_header
from diffsynth_core.weights.key_maps import Shape
from diffsynth_core.weights.lora import STORED, FullDifference, Lora, LoraPair, StoredTensor, lora_scale
from diffsynth_core.weights.lora_formats import DIT, PEFT_PREFIX, LoraKeys, LoraNaming
from diffsynth_core.weights.lora_keys import (
    LoraMatch,
    is_difference_key,
    is_lora_key,
    match_lora_keys,
    refuse_other_adapters,
)
from diffsynth_core.weights.weight_sets import Span

ADAPTER_SETTINGS = "lora_adapter_metadata"
"""The key in the metadata of a header where diffusers stores peft's settings, as JSON: `<prefix>.lora_alpha` etc."""
ADAPTER_CONFIG = "adapter_config.json"
"""The file next to a LoRA in which peft stores its settings."""
PEFT_FILE = "adapter_model.safetensors"
"""The name that peft gives to the LoRA file."""
NUMBERS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}
"""Dtypes of a single stored number -> their formats in `struct`; bfloat16 is the upper half of float32."""

REEXPORT = "re-export the file"
"""Hint for damaged LoRA files."""
ANOTHER = "pass a LoRA for this model"
"""Hint for LoRAs of other models."""


def read_lora_file(
    path: Path,
    module_shapes: Mapping[str, Shape],
    naming: LoraNaming = DIT,
    besides: Collection[str] = (),
    allow_unmatched: bool = False,
    tensor_shapes: Mapping[str, Shape] | None = None,
    way_out: str = ANOTHER,
) -> Lora:
    """The LoRA of a base component, after checking that every key of the file matches a module of the right shape.

    Args:
        module_shapes: weight shape of each module of the base component, by public name.
        besides: keys of the file that are not part of the LoRA.
        allow_unmatched: accept keys that match no module, as long as others do; the result names them.
        tensor_shapes: shape of each tensor of the base component, by public name, if full differences are accepted.
        way_out: the hint if only some keys match.

    Raises:
        DiffSynthError: when the file has no keys, one matches no module, A or B is missing, a shape does not match, or
            it is an adapter of another kind.
    """
    header = read_header(path)
    match = match_to_base(path, header.tensors, module_shapes, naming, besides, allow_unmatched, tensor_shapes, way_out)
    return _read(path, header, match)


def match_to_base(
    origin: Path,
    tensors: Mapping[str, TensorHeader],
    module_shapes: Mapping[str, Shape],
    naming: LoraNaming = DIT,
    besides: Collection[str] = (),
    allow_unmatched: bool = False,
    tensor_shapes: Mapping[str, Shape] | None = None,
    way_out: str = ANOTHER,
) -> LoraMatch:
    """Match the tensors of a LoRA file to modules of a base, by names and shapes.

    Raises:
        DiffSynthError: as `read_lora_file`.
    """
    keys = [name for name in tensors if name not in besides]
    refuse_other_adapters(origin, keys)
    match = match_lora_keys(keys, module_shapes, naming, tensor_shapes or ())
    if not (match.loras or match.differences) or (match.unmatched and not allow_unmatched):
        raise _unmatched(origin, keys, match, module_shapes, naming, way_out)
    shapes = {f"{module}.weight": shape for module, shape in module_shapes.items()} | dict(tensor_shapes or {})
    check_shapes(origin, tensors, match, shapes)
    return match


def read_matched_lora(path: Path, header: Header, match: LoraMatch) -> Lora:
    """The LoRA of a file whose base is not given.

    Raises:
        DiffSynthError: when A or B is missing or they do not match, or an alpha is missing or not finite.
    """
    check_shapes(path, header.tensors, match)
    return _read(path, header, match)


def _read(path: Path, header: Header, match: LoraMatch) -> Lora:
    """Raises: DiffSynthError: when an alpha is missing or not finite."""
    stated = read_stated_scales(path, header)
    pairs = {name: _read_pair(path, header, name, keys, stated) for name, keys in match.loras.items()}
    differences = {name: FullDifference(name, _stored(path, header, key)) for name, key in match.differences.items()}
    return Lora.of(path, match, pairs, differences)


def _stored(path: Path, header: Header, key: str) -> StoredTensor:
    tensor = header.tensors[key]
    return StoredTensor(tensor.dtype, tensor.shape, Span(path, *header.spans[key]), key)


def _read_pair(path: Path, header: Header, module: str, keys: LoraKeys, stated: "StatedScales") -> LoraPair:
    assert keys.A and keys.B
    matrices = _stored(path, header, keys.A), _stored(path, header, keys.B)
    rank = matrices[0].shape[0]
    if keys.alpha:
        alpha = read_number(path, header, keys.alpha)
        if not math.isfinite(alpha):
            raise DiffSynthError(f"`{path}`: `{keys.alpha}` is not a finite number", REEXPORT)
        return LoraPair(module, *matrices, alpha, STORED)
    if stated.missing:
        raise DiffSynthError(
            f"`{path}`: {stated.missing}", f"put the `{ADAPTER_CONFIG}` from the same training next to it"
        )
    scale = stated.of(keys.A, rank)
    return LoraPair(module, *matrices) if scale == 1 else LoraPair(module, *matrices, scale * rank, stated.source)


# Scales


@dataclass(frozen=True)
class StatedScales:
    """What peft's settings state about the scales of LoRAs without a stored alpha.

    `of`: key of A and its rank -> its scale. `source`: where that is stated, in words.
    `missing`: why it is unknown, as a clause; "" if it is known.
    """

    of: Callable[[str, int], float]
    source: str = ""
    missing: str = ""


def read_stated_scales(path: Path, header: Header) -> StatedScales:
    """The scales according to peft's settings in the metadata of a file, or in the `adapter_config.json` next to it.

    The latter is read only for files that peft itself has written, as their name or the prefix of their keys shows.

    Raises:
        DiffSynthError: when the settings are not those of a LoRA.
    """
    if ADAPTER_SETTINGS in header.metadata:
        what = f"`{path}`: cannot read `{ADAPTER_SETTINGS}` in its metadata"
        try:
            settings = as_type(parse_json(header.metadata[ADAPTER_SETTINGS]), dict[str, Any])
        except (InvalidJson, WrongType) as error:
            raise DiffSynthError(f"{what}: {error}", REEXPORT) from error
        return StatedScales(_scales_by(settings, what), "in the metadata")
    by_peft = any(PEFT_PREFIX in key for key in header.tensors if is_lora_key(key))
    config = path.with_name(ADAPTER_CONFIG)
    if (by_peft or path.name == PEFT_FILE) and config.is_file():
        settings = read_json(config, dict[str, Any], REEXPORT)
        what = f"`{config}` is not a LoRA config of peft"
        return StatedScales(_scales_by(settings, what, by_peft=True), f"in `{ADAPTER_CONFIG}`")
    missing = (
        f"its keys have the prefix `{PEFT_PREFIX}` of peft, which keeps alphas in `{ADAPTER_CONFIG}` next to the file, "
        "and that is missing"
    )
    return StatedScales(lambda key, rank: lora_scale(None, rank), missing=missing if by_peft else "")


def _scales_by(settings: Mapping[str, Any], what: str, by_peft: bool = False) -> Callable[[str, int], float]:
    """Scales according to peft's settings, whose names may have the prefix of a component.

    `by_peft`: they are peft's own file, which must be that of a LoRA. `what`: the start of the error if they are not.
    """
    prefixes = [name.removesuffix("lora_alpha") for name in settings if name.endswith("lora_alpha")]
    if by_peft and (not prefixes or settings.get("peft_type", "LORA") != "LORA"):
        raise DiffSynthError(f"{what}: expected `peft_type` `LORA` and `lora_alpha`", REEXPORT)

    def scale(key: str, rank: int) -> float:
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if prefix is None:
            return lora_scale(None, rank)
        try:
            alpha = _alpha_setting(settings, prefix, key)
        except (WrongType, re.error) as error:
            raise DiffSynthError(f"{what}: {error}", REEXPORT) from error
        return lora_scale(alpha, rank, bool(settings.get(f"{prefix}use_rslora")))

    return scale


def _alpha_setting(settings: Mapping[str, Any], prefix: str, key: str) -> float:
    """The alpha of the module of a key. peft matches `alpha_pattern` with the end of the module's name."""
    module = key.removeprefix(prefix).partition(".lora_")[0]
    own = as_type(settings.get(f"{prefix}alpha_pattern") or {}, dict[str, Any], f"{prefix}alpha_pattern")
    alpha = next(
        (own[pattern] for pattern in own if re.match(rf"(.*\.)?({pattern})$", module)), settings[f"{prefix}lora_alpha"]
    )
    return as_type(alpha, float, f"{prefix}lora_alpha")


def read_number(path: Path, header: Header, key: str) -> float:
    """The value of a tensor of one element.

    Raises:
        DiffSynthError: when its dtype is not one that programs store numbers in.
    """
    dtype, (begin, end) = header.tensors[key].dtype, header.spans[key]
    with path.open("rb") as stream:
        stream.seek(begin)
        data = stream.read(end - begin)
    if dtype == "BF16":
        dtype, data = "F32", b"\0\0" + data
    if dtype not in NUMBERS:
        raise DiffSynthError(f"`{path}`: `{key}` has dtype {dtype}, expected a float", REEXPORT)
    return float(struct.unpack(NUMBERS[dtype], data)[0])


# Shapes


def check_shapes(
    origin: object, tensors: Mapping[str, TensorHeader], match: LoraMatch, shapes: Mapping[str, Shape] | None = None
) -> None:
    """Check that each LoRA has A and B, that they match each other, and the tensors that they change.

    Args:
        shapes: those of the tensors of the base, by public name; None if it is not given.

    Raises:
        DiffSynthError: when they do not; when one has no floating-point dtype, or an alpha is not one number.
    """
    for name, keys in match.loras.items():
        base = None if shapes is None else match.vocabulary.shape(f"{name}.weight", shapes)
        title = f"the LoRA of `{name}`" if shapes is None else _title(name, match)
        _check_pair(origin, tensors, title, keys, base)
    for name, key in match.differences.items():
        _check_difference(origin, tensors[key], name, key, match.vocabulary.shape(name, shapes or {}))


def _title(name: str, match: LoraMatch) -> str:
    """The LoRA of a module, by its name in the file's vocabulary, as messages name it."""
    public = match.vocabulary.public(name)
    if len(public) != 1:
        return f"the LoRA of `{name}`"
    text = f"the LoRA of `{public[0]}`"
    return text if len(match.vocabulary.parts(public[0])) == 1 else f"{text} (its part `{name}`)"


def _check_pair(
    origin: object, tensors: Mapping[str, TensorHeader], title: str, keys: LoraKeys, base: Shape | None
) -> None:
    """Check one LoRA; `base`: the shape of the weight that it changes, () if unknown, None if the base is not given."""
    if not keys.A or not keys.B:
        present = "lora_A but no lora_B" if keys.A else "lora_B but no lora_A" if keys.B else "no lora_A and no lora_B"
        raise DiffSynthError(f"`{origin}`: {title} has {present}", REEXPORT)
    for key in (keys.A, keys.B):
        if tensors[key].dtype not in FLOATING_POINT:
            raise DiffSynthError(f"`{origin}`: `{key}` has dtype {tensors[key].dtype}, expected a float", REEXPORT)
    if keys.alpha and tensors[keys.alpha].shape not in ((), (1,)):
        raise DiffSynthError(f"`{origin}`: `{keys.alpha}` is not a single number", REEXPORT)
    a, b = tensors[keys.A].shape, tensors[keys.B].shape
    rank = a[0] if a else 0
    if base is not None and (not base or a != (rank, *base[1:]) or b != (base[0], rank, *[1] * len(base[2:]))):
        raise DiffSynthError(
            f"`{origin}`: {title} is {list(b)} x {list(a)}, which does not match its weight {list(base)}", ANOTHER
        )
    if base is not None and not rank:
        raise DiffSynthError(f"`{origin}`: {title} has rank 0", REEXPORT)
    if len(a) < 2 or not rank or not b or not b[0] or b[1:] != (rank, *[1] * (len(a) - 2)):
        raise DiffSynthError(
            f"`{origin}`: lora_B and lora_A of {title} do not match: {list(b)} and {list(a)}", REEXPORT
        )


def _check_difference(origin: object, tensor: TensorHeader, name: str, key: str, base: Shape) -> None:
    """Raises: DiffSynthError: when a full difference has no floating-point dtype or another shape than its tensor."""
    if tensor.dtype not in FLOATING_POINT:
        raise DiffSynthError(f"`{origin}`: `{key}` has dtype {tensor.dtype}, expected a float", REEXPORT)
    if tensor.shape != base or not base:
        raise DiffSynthError(
            f"`{origin}`: `{key}` is {list(tensor.shape)}, which does not match the tensor `{name}` {list(base)} "
            "that it is added to",
            ANOTHER,
        )


# Keys without a module


def _unmatched(
    path: Path,
    keys: Sequence[str],
    match: LoraMatch,
    modules: Collection[str],
    naming: LoraNaming,
    way_out: str,
) -> DiffSynthError:
    """Keys without a module; full weights of a checkpoint that also contains a LoRA are named as such."""
    if not keys:
        return DiffSynthError(f"`{path}` contains no LoRA", ANOTHER)
    full = [name for name in match.unmatched if not is_lora_key(name) and not is_difference_key(name)]
    known = [name for name in full if name.startswith("pipe.") or name.removesuffix(".weight") in modules]
    if known and len(full) == len(match.unmatched) < len(keys):
        components = {name.split(".")[1] if name.startswith("pipe.") else naming.component for name in full}
        return DiffSynthError(
            f"`{path}` contains {pluralize(len(full), 'full weight')} of {', '.join(sorted(components))} besides the LoRA "
            f"of {naming.component}, but only a LoRA is supported here",
            "use a file with only the LoRA, or resume the run that wrote this one with `--resume auto`",
        )
    if match.repeated:
        return DiffSynthError(
            f"`{path}` contains {pluralize(len(match.repeated), 'tensor')} twice, under different keys: "
            f"{list_names(sorted(match.repeated))}",
            REEXPORT,
        )
    return DiffSynthError(
        f"`{path}`: {len(match.unmatched)} of {pluralize(len(keys), 'key')} "
        f"{verb(len(match.unmatched), 'matches', 'match')} no module: {list_names(sorted(match.unmatched))}",
        way_out if match.loras else ANOTHER,
    )

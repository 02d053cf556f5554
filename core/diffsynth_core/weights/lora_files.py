"""LoRA files: what they hold, and whether it fits the base they are for, by headers and alphas. No torch."""

import math
import re
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffsynth_core.errors import DiffSynthError, list_names
from diffsynth_core.json_files import InvalidJson, WrongType, as_type, parse_json, read_json
from diffsynth_core.progress import pluralize
from diffsynth_core.weights.dtypes import FLOATING_POINT
from diffsynth_core.weights.headers import Header, TensorHeader, read_header
from diffsynth_core.weights.lora_names import (
    DIT,
    PEFT_PREFIX,
    LoraKeys,
    LoraMatch,
    LoraNaming,
    find_lora_keys,
    is_difference_key,
    is_lora_key,
    refuse_other_adapters,
)
from diffsynth_core.weights.lora_rows import (
    ModuleLora,
    Rows,
    StoredDifference,
    StoredLora,
    StoredTensor,
    joint_rank,
    to_documented,
)
from diffsynth_core.weights.weight_sets import Span

ADAPTER_SETTINGS = "lora_adapter_metadata"
"""Where in the metadata of a header diffusers keeps the settings of peft, as JSON: `<prefix>.lora_alpha` and others."""
ADAPTER_CONFIG = "adapter_config.json"
"""The file beside a LoRA in which peft keeps its settings."""
PEFT_FILE = "adapter_model.safetensors"
"""What peft calls the file that they are of."""
NUMBERS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}
"""Formats in which a single number is stored, as `struct` knows them; bfloat16 is the upper half of float32."""

WRITE_ANEW = "re-export the file"
ANOTHER = "pass a LoRA for this model"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file whose keys fit the base.

    `loras`: as the file has them. `modules`: documented module -> the LoRAs that change it, row by row.
    `tensors`: documented tensor -> the whole differences that are added to it, row by row.
    `unmatched`: keys that fit no module, where that is allowed.
    """

    path: Path
    loras: tuple[StoredLora, ...]
    modules: Mapping[str, ModuleLora]
    tensors: Mapping[str, Rows[StoredDifference]] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()

    @property
    def weights(self) -> frozenset[str]:
        """Documented names of the tensors that it changes."""
        return frozenset((*(f"{module}.weight" for module in self.modules), *self.tensors))


def read_lora_file(
    path: Path,
    module_shapes: Mapping[str, tuple[int, ...]],
    naming: LoraNaming = DIT,
    besides: Collection[str] = (),
    allow_unmatched: bool = False,
    tensor_shapes: Mapping[str, tuple[int, ...]] | None = None,
    way_out: str = ANOTHER,
) -> LoraFile:
    """Prove that every key of a LoRA file finds a module of a fitting shape, without reading weights into memory.

    Args:
        module_shapes: weight shape of each module of the base component, by its documented name.
        besides: keys of the file that are no LoRA.
        allow_unmatched: keys that find no module are told in the result, as long as others do.
        tensor_shapes: shape of each tensor of the base component, by documented name, where whole differences are
            taken too.
        way_out: the hint where some keys find a module and others none.

    Raises:
        DiffSynthError: when there is no key, one finds no module, a half is missing, a shape does not fit, or the file
            holds an adapter of another kind.
    """
    header = read_header(path)
    match = fit_lora(path, header.tensors, module_shapes, naming, besides, allow_unmatched, tensor_shapes, way_out)
    loras, differences = read_stored(path, header, match)
    return LoraFile(
        path,
        tuple(loras.values()),
        to_documented(loras, match.vocabulary),
        to_documented(differences, match.vocabulary),
        match.unmatched,
    )


def fit_lora(
    origin: Path,
    tensors: Mapping[str, TensorHeader],
    module_shapes: Mapping[str, tuple[int, ...]],
    naming: LoraNaming = DIT,
    besides: Collection[str] = (),
    allow_unmatched: bool = False,
    tensor_shapes: Mapping[str, tuple[int, ...]] | None = None,
    way_out: str = ANOTHER,
) -> LoraMatch:
    """What the tensors of a LoRA file are of, by names and shapes.

    Raises:
        DiffSynthError: as `read_lora_file`.
    """
    keys = [name for name in tensors if name not in besides]
    refuse_other_adapters(origin, keys)
    match = find_lora_keys(keys, module_shapes, naming, tensor_shapes or ())
    if not (match.loras or match.differences) or (match.unmatched and not allow_unmatched):
        raise _unmatched(origin, keys, match, module_shapes, naming, way_out)
    shapes = {f"{module}.weight": shape for module, shape in module_shapes.items()} | dict(tensor_shapes or {})
    for name, halves in match.loras.items():
        check_halves(origin, tensors, _title(name, match), halves, match.vocabulary.shape(f"{name}.weight", shapes))
    for name, key in match.differences.items():
        _check_difference(origin, tensors[key], name, key, match.vocabulary.shape(name, shapes))
    return match


def _title(name: str, match: LoraMatch) -> str:
    """The LoRA of a module, by its name in the file's vocabulary, as messages call it."""
    wholes = match.vocabulary.documented(name)
    if len(wholes) != 1:
        return f"the LoRA of `{name}`"
    text = f"the LoRA of `{wholes[0]}`"
    return text if len(match.vocabulary.parts(wholes[0])) == 1 else f"{text} (its part `{name}`)"


def read_stored(
    path: Path, header: Header, match: LoraMatch
) -> tuple[dict[str, StoredLora], dict[str, StoredDifference]]:
    """The LoRAs of a file, and its whole differences, by their names in its vocabulary.

    Raises:
        DiffSynthError: when halves are missing or do not fit each other, or an alpha is missing or no finite number.
    """
    stated = stated_scales(path, header)
    loras = {}
    for name, keys in match.loras.items():
        check_halves(path, header.tensors, f"the LoRA of `{name}`", keys)
        loras[name] = _stored_lora(path, header, name, keys, stated)
    differences = {
        name: StoredDifference(name, stored_tensor(path, header, key)) for name, key in match.differences.items()
    }
    return loras, differences


def stored_tensor(path: Path, header: Header, key: str) -> StoredTensor:
    """Where a file keeps a tensor."""
    tensor = header.tensors[key]
    return StoredTensor(tensor.dtype, tensor.shape, Span(path, *header.spans[key]), key)


def _stored_lora(path: Path, header: Header, module: str, keys: LoraKeys, stated: "Scales") -> StoredLora:
    assert keys.down and keys.up
    lora = StoredLora(module, stored_tensor(path, header, keys.down), stored_tensor(path, header, keys.up))
    if keys.alpha:
        alpha = read_number(path, header, keys.alpha)
        if not math.isfinite(alpha):
            raise DiffSynthError(f"`{path}`: `{keys.alpha}` is not a finite number", WRITE_ANEW)
        return replace(lora, alpha=alpha, alpha_origin="stored")
    if stated.missing:
        raise DiffSynthError(
            f"`{path}`: {stated.missing}", f"put the `{ADAPTER_CONFIG}` from the same training next to it"
        )
    scale = stated.of(keys.down, lora.rank)
    return lora if scale == 1 else replace(lora, alpha=scale * lora.rank, alpha_origin=stated.origin)


# Scales


@dataclass(frozen=True)
class Scales:
    """What a file says of the scales of LoRAs without an alpha of their own.

    `of`: key of a lora_A and its rank -> its scale. `origin`: where that stands, in words.
    `missing`: why they are unknown, as a clause; blank: they are known.
    """

    of: Callable[[str, int], float]
    origin: str = ""
    missing: str = ""


def stated_scales(path: Path, header: Header) -> Scales:
    """The scales by the settings of peft in the metadata of a file, or in the `adapter_config.json` beside it.

    That file is read for what peft itself writes, told by the name of the file or the beginning of its keys.
    """
    if ADAPTER_SETTINGS in header.metadata:
        what = f"`{path}`: cannot read `{ADAPTER_SETTINGS}` in its metadata"
        try:
            settings = as_type(parse_json(header.metadata[ADAPTER_SETTINGS]), dict[str, Any])
        except (InvalidJson, WrongType) as error:
            raise DiffSynthError(f"{what}: {error}", WRITE_ANEW) from error
        return Scales(_scales_by(settings, what), "in the metadata")
    by_peft = any(PEFT_PREFIX in key for key in header.tensors if is_lora_key(key))
    config = path.with_name(ADAPTER_CONFIG)
    if (by_peft or path.name == PEFT_FILE) and config.is_file():
        settings = read_json(config, dict[str, Any], WRITE_ANEW)
        what = f"`{config}` is not a LoRA config of peft"
        return Scales(_scales_by(settings, what, by_peft=True), f"in `{ADAPTER_CONFIG}`")
    missing = (
        f"its keys have the prefix `{PEFT_PREFIX}` of peft, which keeps alphas in `{ADAPTER_CONFIG}` next to the file, "
        "and that is missing"
    )
    return Scales(lambda down, rank: 1.0, missing=missing if by_peft else "")


def _scales_by(settings: Mapping[str, Any], what: str, by_peft: bool = False) -> Callable[[str, int], float]:
    """Scales by settings of peft, whose names stand behind the prefix of a component, if any.

    `by_peft`: they are peft's own file, which must be that of a LoRA. `what`: the error where they say no scales.
    """
    prefixes = [name.removesuffix("lora_alpha") for name in settings if name.endswith("lora_alpha")]
    if by_peft and (not prefixes or settings.get("peft_type", "LORA") != "LORA"):
        raise DiffSynthError(f"{what}: expected `peft_type` `LORA` and `lora_alpha`", WRITE_ANEW)

    def scale(down: str, rank: int) -> float:
        prefix = next((prefix for prefix in prefixes if down.startswith(prefix)), None)
        try:
            return 1.0 if prefix is None else _stated_scale(settings, prefix, down, rank)
        except (WrongType, re.error) as error:
            raise DiffSynthError(f"{what}: {error}", WRITE_ANEW) from error

    return scale


def _stated_scale(settings: Mapping[str, Any], prefix: str, down: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA.

    An alpha of its own is found as peft does it: by the end of the module's name, which may be a pattern.
    """
    module = down.removeprefix(prefix).partition(".lora_")[0]
    own = as_type(settings.get(f"{prefix}alpha_pattern") or {}, dict[str, Any], f"{prefix}alpha_pattern")
    alpha = next(
        (own[pattern] for pattern in own if re.match(rf"(.*\.)?({pattern})$", module)), settings[f"{prefix}lora_alpha"]
    )
    return as_type(alpha, float, f"{prefix}lora_alpha") / (
        math.sqrt(rank) if settings.get(f"{prefix}use_rslora") else rank
    )


def read_number(path: Path, header: Header, key: str) -> float:
    """The value of a tensor of one element.

    Raises:
        DiffSynthError: when it is stored in a format that no program uses for it.
    """
    dtype, (begin, end) = header.tensors[key].dtype, header.spans[key]
    with path.open("rb") as stream:
        stream.seek(begin)
        data = stream.read(end - begin)
    if dtype == "BF16":
        dtype, data = "F32", b"\0\0" + data
    if dtype not in NUMBERS:
        raise DiffSynthError(f"`{path}`: `{key}` has dtype {dtype}, expected a float", WRITE_ANEW)
    return float(struct.unpack(NUMBERS[dtype], data)[0])


# Ranks


def check_lora_file(
    path: Path, module_shapes: Mapping[str, tuple[int, ...]], naming: LoraNaming = DIT, besides: Collection[str] = ()
) -> dict[str, int]:
    """As `read_lora_file`; returns the rank of each documented module's one LoRA.

    Where the file has several LoRAs of one module, of separate q, k and v, the one that is all of them has their joint
    rank.
    """
    return ranks_of(read_lora_file(path, module_shapes, naming, besides))


def ranks_of(file: LoraFile) -> dict[str, int]:
    """The rank of each documented module's one LoRA."""
    return {module: joint_rank(lora) for module, lora in file.modules.items()}


# What does not fit


def _unmatched(
    path: Path,
    keys: Sequence[str],
    match: LoraMatch,
    modules: Collection[str],
    naming: LoraNaming,
    way_out: str,
) -> DiffSynthError:
    """Keys without a module; the full weights of a checkpoint that holds both are told as such."""
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
            WRITE_ANEW,
        )
    return DiffSynthError(
        f"`{path}`: {len(match.unmatched)} of {len(keys)} keys match no module: {list_names(sorted(match.unmatched))}",
        way_out if match.loras else ANOTHER,
    )


def check_halves(
    origin: object,
    tensors: Mapping[str, TensorHeader],
    text: str,
    keys: LoraKeys,
    base: tuple[int, ...] | None = None,
) -> None:
    """Prove that one LoRA has both halves, and that they fit each other and the weight of shape `base`.

    Args:
        text: what messages call it.

    Raises:
        DiffSynthError: when they do not; when one is no floating-point tensor, or the alpha is not one number.
    """
    if not keys.down or not keys.up:
        present = (
            "lora_A but no lora_B" if keys.down else "lora_B but no lora_A" if keys.up else "no lora_A and no lora_B"
        )
        raise DiffSynthError(f"`{origin}`: {text} has {present}", WRITE_ANEW)
    for key in (keys.down, keys.up):
        if tensors[key].dtype not in FLOATING_POINT:
            raise DiffSynthError(f"`{origin}`: `{key}` has dtype {tensors[key].dtype}, expected a float", WRITE_ANEW)
    if keys.alpha and tensors[keys.alpha].shape not in ((), (1,)):
        raise DiffSynthError(f"`{origin}`: `{keys.alpha}` is not a single number", WRITE_ANEW)
    down, up = tensors[keys.down].shape, tensors[keys.up].shape
    rank = down[0] if down else 0
    if base is not None and (not base or down != (rank, *base[1:]) or up != (base[0], rank, *[1] * len(base[2:]))):
        raise DiffSynthError(
            f"`{origin}`: {text} is {list(up)} x {list(down)}, which does not match its weight {list(base)}", ANOTHER
        )
    if base is not None and not rank:
        raise DiffSynthError(f"`{origin}`: {text} has rank 0", WRITE_ANEW)
    sides = len(down)
    if sides < 2 or not rank or not up or not up[0] or up[1:] != (rank, *[1] * (sides - 2)):
        raise DiffSynthError(
            f"`{origin}`: lora_B and lora_A of {text} do not match: {list(up)} and {list(down)}", WRITE_ANEW
        )


def _check_difference(origin: object, tensor: TensorHeader, name: str, key: str, base: tuple[int, ...]) -> None:
    """Raises: DiffSynthError: when a whole difference is no floating-point tensor of the shape `base`."""
    if tensor.dtype not in FLOATING_POINT:
        raise DiffSynthError(f"`{origin}`: `{key}` has dtype {tensor.dtype}, expected a float", WRITE_ANEW)
    if tensor.shape != base or not base:
        raise DiffSynthError(
            f"`{origin}`: `{key}` is {list(tensor.shape)}, which does not match the tensor `{name}` {list(base)} "
            "that it is added to",
            ANOTHER,
        )

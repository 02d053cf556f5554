"""LoRA files against the base they are for, by headers and, where halves must be the same, by bytes. No torch."""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffsynth_core.errors import DiffSynthError, shorten
from diffsynth_core.json_files import InvalidJson, WrongType, as_type, parse_json
from diffsynth_core.progress import count_of
from diffsynth_core.state_dicts.headers import FLOATING_POINT, Header, TensorHeader, read_header
from diffsynth_core.state_dicts.key_maps import KeyMap, Rows
from diffsynth_core.state_dicts.lora_names import (
    DIT,
    LoraKeys,
    LoraNaming,
    find_lora_keys,
    is_lora_key,
    refuse_other_adapters,
)
from diffsynth_core.state_dicts.values import read_bytes
from diffsynth_core.state_dicts.weight_sets import Span

ADAPTER_SETTINGS = "lora_adapter_metadata"
"""Where in the metadata of a header diffusers keeps the settings of peft, as JSON: `<prefix>.lora_alpha` and others."""


@dataclass(frozen=True)
class LoraPart:
    """Where a file keeps one LoRA, and its rank.

    `stated`: the scale that the file's metadata say; it counts where no alpha is stored.
    `rows`: those of B that are this module's, where the file has it and others as one; None: all.
    """

    keys: LoraKeys
    rank: int
    stated: float = 1.0
    rows: Rows | None = None


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file whose keys fit the base.

    `names`: documented names -> those of the file's dialect.
    `modules`: documented module -> name of a weight in the dialect, of the module or a part of it -> its LoRA.
    `unmatched`: keys that fit no module, where that is allowed.
    """

    path: Path
    names: KeyMap
    modules: Mapping[str, Mapping[str, LoraPart]]
    unmatched: tuple[str, ...] = ()

    @property
    def parts(self) -> list[LoraPart]:
        """Every LoRA of the file."""
        return [part for parts in self.modules.values() for part in parts.values()]


def read_lora_file(
    path: Path,
    module_shapes: Mapping[str, tuple[int, ...]],
    naming: LoraNaming = DIT,
    besides: Collection[str] = (),
    allow_unmatched: bool = False,
) -> LoraFile:
    """Prove that every key of a LoRA file finds a module of a fitting shape, without reading weights into memory.

    Args:
        module_shapes: weight shape of each module of the base component, by its documented name.
        besides: keys of the file that are no LoRA.
        allow_unmatched: keys that find no module are told in the result, as long as others do.

    Raises:
        DiffSynthError: when there is no key, one finds no module, a half is missing, a shape does not fit, or the file
            holds an adapter of another kind.
    """
    header = read_header(path)
    dialect, modules, unmatched = fit_lora(path, header.tensors, module_shapes, naming, besides, allow_unmatched)
    stated = stated_scales(path, header)
    scaled = {
        module: {name: replace(part, stated=stated(part.keys.down or "", part.rank)) for name, part in parts.items()}
        for module, parts in modules.items()
    }
    return LoraFile(path, naming.names(dialect), scaled, tuple(unmatched))


def fit_lora(
    origin: Path,
    tensors: Mapping[str, TensorHeader],
    module_shapes: Mapping[str, tuple[int, ...]],
    naming: LoraNaming = DIT,
    besides: Collection[str] = (),
    allow_unmatched: bool = False,
) -> tuple[str, dict[str, dict[str, LoraPart]], list[str]]:
    """The dialect of LoRA tensors, the modules they are for, and unmatched keys, as of `LoraFile`, by names and shapes.

    Raises:
        DiffSynthError: as `read_lora_file`.
    """
    keys = [name for name in tensors if name not in besides]
    refuse_other_adapters(origin, keys)
    dialect, found, unmatched = find_lora_keys(keys, module_shapes, naming)
    if not found or (unmatched and not allow_unmatched):
        raise _unmatched(origin, keys, unmatched, module_shapes, naming)
    names = naming.names(dialect)
    modules: dict[str, dict[str, LoraPart]] = {}
    for module, parts in found.items():
        shapes = names.cut_shape(f"{module}.weight", module_shapes[module])
        for part, keys_of_part in zip(shapes, parts, strict=True):
            if keys_of_part == LoraKeys():
                continue
            whole, rows = shapes[part], None
            if keys_of_part.fused:
                whole, rows = _fused(module, keys_of_part.fused, naming.fused[dialect], module_shapes)
            rank = _check_halves(origin, tensors, _told(module, part, len(parts)), keys_of_part, whole)
            modules.setdefault(module, {})[part] = LoraPart(keys_of_part, rank, rows=rows)
    return dialect, modules, unmatched


def _fused(
    module: str, fused: str, names: KeyMap, module_shapes: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[int, ...], Rows]:
    """The shape of what a dialect has as one, and which of its rows are those of `module`."""
    shapes = {part: module_shapes.get(part, ()) for part in names.ours(fused) or ()}
    whole = names.join_shape(fused, shapes) if all(shapes.values()) else ()
    return whole, names.cut_rows(fused, whole[0])[module] if whole else ()


def stated_scales(path: Path, header: Header) -> Callable[[str, int], float]:
    """Key of a lora_A and its rank -> its scale by the settings of peft in the metadata of the file; 1 without them."""
    try:
        settings = as_type(parse_json(header.metadata.get(ADAPTER_SETTINGS, "{}")), dict[str, Any])
    except (InvalidJson, WrongType) as error:
        raise _unreadable_settings(path, error) from error
    prefixes = [name.removesuffix("lora_alpha") for name in settings if name.endswith("lora_alpha")]

    def scale(down: str, rank: int) -> float:
        prefix = next((prefix for prefix in prefixes if down.startswith(prefix)), None)
        try:
            return 1.0 if prefix is None else _stated_scale(settings, prefix, down, rank)
        except (WrongType, re.error) as error:
            raise _unreadable_settings(path, error) from error

    return scale


def _unreadable_settings(path: Path, error: Exception) -> DiffSynthError:
    what = f"`{path}`: `{ADAPTER_SETTINGS}` in its metadata cannot be read: {error}"
    return DiffSynthError(what, WRITE_ANEW)


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


def check_lora_file(
    path: Path, module_shapes: Mapping[str, tuple[int, ...]], naming: LoraNaming = DIT, besides: Collection[str] = ()
) -> dict[str, int]:
    """As `read_lora_file`, and prove that the file has one LoRA of each module; returns rank by module.

    Where the dialect of the file has several parts of one module, all of them must be there and have the same lora_A:
    else they are LoRAs of their own, of which one LoRA of this rank cannot be made.
    """
    return check_whole(read_lora_file(path, module_shapes, naming, besides))


def check_whole(file: LoraFile) -> dict[str, int]:
    """The rank of each module's one LoRA.

    Raises:
        DiffSynthError: when parts of a module are missing or have a lora_A each.
    """
    header = read_header(file.path)
    ranks = {}
    for module, parts in file.modules.items():
        expected = file.names.ours(f"{module}.weight") or ()
        for part in expected:
            if part not in parts:
                raise DiffSynthError(f"`{file.path}`: {_told(module, part, len(expected))} lacks a half", WRITE_ANEW)
        if not _one_down(file.path, header, [part.keys for part in parts.values()]):
            names = [part.removesuffix(".weight") for part in parts]
            raise DiffSynthError(
                f"`{file.path}`: {shorten(names)} have LoRAs of their own, with another lora_A each; `{module}`, "
                f"which they are together, takes one LoRA of their rank",
                "merge it into the base with `--preset_lora_path`, or make each one LoRA, of a higher rank, with "
                "`diffsynth convert-lora --to diffsynth`",
            )
        ranks[module] = next(iter(parts.values())).rank
    return ranks


WRITE_ANEW = "write the file anew"
ANOTHER = "name a LoRA of this model"


def _unmatched(
    path: Path, keys: Sequence[str], unmatched: Sequence[str], modules: Collection[str], naming: LoraNaming
) -> DiffSynthError:
    """Keys without a module; the full weights of a checkpoint that holds both are told as such."""
    if not keys:
        return DiffSynthError(f"`{path}` holds no LoRA", ANOTHER)
    full = [name for name in unmatched if not is_lora_key(name)]
    known = [name for name in full if name.startswith("pipe.") or name.removesuffix(".weight") in modules]
    if known and len(full) == len(unmatched) < len(keys):
        components = {name.split(".")[1] if name.startswith("pipe.") else naming.component for name in full}
        return DiffSynthError(
            f"`{path}` holds {count_of(len(full), 'full weight')} of {', '.join(sorted(components))} beside the LoRA "
            f"of {naming.component}; only a LoRA is read here",
            "name a file that holds the LoRA alone, or go on with the run that wrote this one: `--resume auto`",
        )
    return DiffSynthError(
        f"`{path}`: {len(unmatched)} of {len(keys)} keys fit no module: {shorten(sorted(unmatched))}", ANOTHER
    )


def _told(module: str, part: str, parts: int) -> str:
    """A module's LoRA, or that of one of its parts, as messages name it."""
    name = f"the LoRA of `{module}`"
    return name if parts == 1 else f"{name} (its part `{part.removesuffix('.weight')}`)"


def _check_halves(
    path: Path, tensors: Mapping[str, TensorHeader], text: str, keys: LoraKeys, base: tuple[int, ...]
) -> int:
    """The rank of one LoRA, whose halves must be there and fit the weight of shape `base`."""
    if not keys.down or not keys.up:
        raise DiffSynthError(f"`{path}`: {text} lacks a half", WRITE_ANEW)
    down, up = tensors[keys.down].shape, tensors[keys.up].shape
    rank = down[0] if down else 0
    check_values(path, tensors, keys)
    if not base or down != (rank, *base[1:]) or up != (base[0], rank, *[1] * len(base[2:])):
        raise DiffSynthError(
            f"`{path}`: {text} is {list(up)} x {list(down)}, which does not fit its weight {list(base)}", ANOTHER
        )
    if not rank:
        raise DiffSynthError(f"`{path}`: {text} has the rank 0", WRITE_ANEW)
    return rank


def check_values(origin: object, tensors: Mapping[str, TensorHeader], keys: LoraKeys) -> None:
    """Raises: DiffSynthError: when a half is in no floating-point format, or the alpha is not one number."""
    for key in filter(None, (keys.down, keys.up)):
        if tensors[key].dtype not in FLOATING_POINT:
            raise DiffSynthError(f"`{origin}`: `{key}` is stored as {tensors[key].dtype}, expected a float", WRITE_ANEW)
    if keys.alpha and tensors[keys.alpha].shape not in ((), (1,)):
        raise DiffSynthError(f"`{origin}`: `{keys.alpha}` is not one number", WRITE_ANEW)


def _one_down(path: Path, header: Header, parts: Sequence[LoraKeys]) -> bool:
    """Whether the parts of a module have the same lora_A, bit for bit."""
    downs = [part.down for part in parts if part.down]
    if len(downs) == 1:
        return True
    if len({header.tensors[down] for down in downs}) > 1:
        return False
    return len({read_bytes(Span(path, *header.spans[down])) for down in downs}) == 1

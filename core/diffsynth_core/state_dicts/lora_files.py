"""LoRA files against the base they are for, by headers and, where halves must be the same, by bytes. No torch."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from diffsynth_core.errors import DiffSynthError, shorten
from diffsynth_core.progress import count_of
from diffsynth_core.state_dicts.headers import Header, read_header
from diffsynth_core.state_dicts.key_maps import KeyMap
from diffsynth_core.state_dicts.lora_names import DIT, LoraKeys, LoraNaming, find_lora_keys, is_lora_key


@dataclass(frozen=True)
class LoraPart:
    """Where a file keeps one LoRA, and its rank."""

    keys: LoraKeys
    rank: int


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file each of whose keys fits the base.

    `names`: documented names -> those of the file's dialect.
    `modules`: documented module -> name of a weight in the dialect, of the module or a part of it -> its LoRA.
    """

    path: Path
    names: KeyMap
    modules: Mapping[str, Mapping[str, LoraPart]]


def read_lora_file(
    path: Path, module_shapes: Mapping[str, tuple[int, ...]], naming: LoraNaming = DIT, besides: Collection[str] = ()
) -> LoraFile:
    """Prove that every key of a LoRA file finds a module of a fitting shape, without reading weights into memory.

    Args:
        module_shapes: weight shape of each module of the base component, by its documented name.
        besides: keys of the file that are no LoRA.

    Raises:
        DiffSynthError: when there is no key, one finds no module, a half is missing, or a shape does not fit.
    """
    header = read_header(path)
    keys = [name for name in header.tensors if name not in besides]
    dialect, found, unmatched = find_lora_keys(keys, module_shapes, naming)
    if unmatched or not found:
        raise _unmatched(path, keys, unmatched, module_shapes, naming)
    names = naming.names(dialect)
    modules: dict[str, dict[str, LoraPart]] = {}
    for module, parts in found.items():
        shapes = names.cut_shape(f"{module}.weight", module_shapes[module])
        for part, keys_of_part in zip(shapes, parts, strict=True):
            if keys_of_part == LoraKeys():
                continue
            rank = _check_halves(path, header, _told(module, part, len(parts)), keys_of_part, shapes[part])
            modules.setdefault(module, {})[part] = LoraPart(keys_of_part, rank)
    return LoraFile(path, names, modules)


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
                "merge it into the base with `--preset_lora_path`, or name a LoRA that was trained on the whole of "
                "these modules",
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


def _check_halves(path: Path, header: Header, text: str, keys: LoraKeys, base: tuple[int, ...]) -> int:
    """The rank of one LoRA, whose halves must be there and fit the weight of shape `base`."""
    if not keys.down or not keys.up:
        raise DiffSynthError(f"`{path}`: {text} lacks a half", WRITE_ANEW)
    down, up = header.tensors[keys.down].shape, header.tensors[keys.up].shape
    rank = down[0] if down else 0
    if down != (rank, *base[1:]) or up != (base[0], rank, *[1] * len(base[2:])):
        raise DiffSynthError(
            f"`{path}`: {text} is {list(up)} x {list(down)}, which does not fit its weight {list(base)}", ANOTHER
        )
    return rank


def _one_down(path: Path, header: Header, parts: Sequence[LoraKeys]) -> bool:
    """Whether the parts of a module have the same lora_A, bit for bit."""
    downs = [part.down for part in parts if part.down]
    if len(downs) == 1:
        return True
    if len({header.tensors[down] for down in downs}) > 1:
        return False
    with path.open("rb") as stream:
        return len({_read(stream, *header.spans[down]) for down in downs}) == 1


def _read(stream: BinaryIO, begin: int, end: int) -> bytes:
    stream.seek(begin)
    return stream.read(end - begin)

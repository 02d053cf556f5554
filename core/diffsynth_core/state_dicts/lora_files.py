"""LoRA files against the base they are for, by headers and, where halves must be the same, by bytes. No torch."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from diffsynth_core.errors import DiffSynthError, shorten
from diffsynth_core.state_dicts.headers import Header, read_header
from diffsynth_core.state_dicts.lora_names import DIT, LoraKeys, LoraNaming, find_lora_keys


def check_lora_file(
    path: Path, module_shapes: Mapping[str, tuple[int, ...]], naming: LoraNaming = DIT, besides: Collection[str] = ()
) -> dict[str, int]:
    """Prove that every key of a LoRA file finds a module of a fitting shape, without reading weights into memory.

    Where the dialect of the file has several parts of one module, all of them must be there and have the same lora_A:
    else they are LoRAs of their own, of which one LoRA of this rank cannot be made.

    Args:
        module_shapes: weight shape of each module of the base component, by its documented name.
        besides: keys of the file that are no LoRA.

    Returns: rank by module.

    Raises:
        DiffSynthError: when a key finds no module, a half is missing, or a shape does not fit.
    """
    header = read_header(path)
    keys = [name for name in header.tensors if name not in besides]
    dialect, found, unmatched = find_lora_keys(keys, module_shapes, naming)
    if unmatched:
        raise DiffSynthError(
            f"`{path}`: {len(unmatched)} of {len(keys)} keys fit no module: {shorten(sorted(unmatched))}",
            "name a LoRA of this model",
        )
    ranks = {}
    for module, parts in found.items():
        shapes = naming.names(dialect).cut_shape(f"{module}.weight", module_shapes[module])
        for part, keys_of_part in zip(shapes, parts, strict=True):
            text = f"`{module}`" if len(parts) == 1 else f"`{module}` (its part `{part.removesuffix('.weight')}`)"
            ranks[module] = _check_halves(path, header, text, keys_of_part, shapes[part])
        if not _one_down(path, header, parts):
            names = [part.removesuffix(".weight") for part in shapes]
            raise DiffSynthError(
                f"`{path}`: {shorten(names)} have LoRAs of their own, with another lora_A each; `{module}`, "
                f"which they are together, takes one LoRA of their rank",
                "leave `--lora_checkpoint` out, or name a LoRA that was trained on the whole of these modules",
            )
    return ranks


def _check_halves(path: Path, header: Header, text: str, keys: LoraKeys, base: tuple[int, ...]) -> int:
    """The rank of one LoRA, whose halves must be there and fit the weight of shape `base`."""
    if not keys.down or not keys.up:
        raise DiffSynthError(f"`{path}`: the LoRA of {text} lacks a half", "write the file anew")
    down, up = header.tensors[keys.down].shape, header.tensors[keys.up].shape
    rank = down[0] if down else 0
    if down != (rank, *base[1:]) or up != (base[0], rank, *[1] * len(base[2:])):
        raise DiffSynthError(
            f"`{path}`: the LoRA of {text} is {list(up)} x {list(down)}, which does not fit its weight {list(base)}",
            "name a LoRA of this model",
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

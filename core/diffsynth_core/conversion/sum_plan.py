"""What making one LoRA of several is going to do, from headers alone. No torch.

The keys stay those of the files; a module is one where its name is the same.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.conversion.lora_inputs import LoraSummary, WeightedFile, open_lora_file, summarise
from diffsynth_core.conversion.merge_plan import FORMATS
from diffsynth_core.conversion.provenance import InputHashes, merge_entry, with_entry
from diffsynth_core.errors import DiffSynthError, Problem, raise_if_any, shorten
from diffsynth_core.state_dicts.headers import Header, read_header
from diffsynth_core.state_dicts.lora_files import (
    ADAPTER_SETTINGS,
    LoraPart,
    check_values,
    stated_scales,
)
from diffsynth_core.state_dicts.lora_names import ALPHA, DIALECTS, LoraKeys, refuse_other_adapters
from diffsynth_core.state_dicts.rewriting import OutputFile, OutputTensor, Pieces, aligned
from diffsynth_core.state_dicts.weight_sets import ENDING

PREFIXES = ("lora_unet_", "diffusion_model.", "transformer.", "pipe.", "lora_te", "text_encoder")
"""How the names of modules begin in files of the dialects; where none does, there is no prefix."""
OF_ONE_TRAINING = ("ss_", "sshs_", ADAPTER_SETTINGS)
"""How metadata begin that are of the training of one file: its rank, its scale, its hash."""


@dataclass(frozen=True)
class SumPart:
    """The LoRA of one module in one file. `file`: its place among them."""

    file: int
    part: LoraPart
    down_shape: tuple[int, ...]
    up_shape: tuple[int, ...]


@dataclass(frozen=True)
class SummedModule:
    """A module of the result: its LoRAs in the files, the rank of their sum, and the keys it is written under."""

    name: str
    parts: tuple[SumPart, ...]
    rank: int
    keys: LoraKeys

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B in the result."""
        first = self.parts[0]
        return (self.rank, *first.down_shape[1:]), (first.up_shape[0], self.rank, *first.up_shape[2:])


@dataclass(frozen=True)
class SumPlan:
    """LoRA files, and the modules of the one that is made of them. `dtype`: in safetensors' words."""

    files: tuple[WeightedFile, ...]
    summaries: tuple[LoraSummary, ...]
    modules: tuple[SummedModule, ...]
    output: Path
    dtype: str
    metadata: Mapping[str, str]
    rank: int | None = None

    @property
    def inputs(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(one.path for one in self.files))

    def told(self, hashes: Mapping[Path, str]) -> dict[str, str]:
        """Metadata of the result."""
        loras = [(one.path, one.weight) for one in self.files]
        settings = {"rank": self.rank} if self.rank else {}
        return with_entry(self.metadata, merge_entry((), loras, hashes, **settings))


def plan_sum(
    files: Sequence[WeightedFile],
    output: Path,
    rank: int | None = None,
    dtype: str | None = None,
    allow_unmatched: bool = False,
) -> SumPlan:
    """The plan of one LoRA made of several. `dtype` as in `FORMATS`; None: float32, in which nothing is rounded.

    Raises:
        FaultsFound: what is wrong with the files, or the name of the output.
    """
    problems: list[Problem] = []
    if output.suffix != ENDING:
        problems.append(
            Problem(f"`--output_path` `{output}` is to be one file", "end it in `.safetensors`", wrong_use=True)
        )
    found = []
    for number, one in enumerate(files):
        try:
            found.append(_read(number, one, allow_unmatched))
        except DiffSynthError as error:
            problems += error.problems
    if len(found) == len(files):
        problems += _strangers(files, found)
    raise_if_any(problems)
    modules: dict[str, list[tuple[SumPart, LoraKeys]]] = {}
    for one_file in found:
        for name, part in one_file.parts.items():
            modules.setdefault(name, []).append(part)
    summed = tuple(_module(files, name, parts, rank) for name, parts in modules.items())
    metadata = _common([one_file.header for one_file in found])
    summaries = tuple(one_file.summary for one_file in found)
    return SumPlan(tuple(files), summaries, summed, output, FORMATS[dtype or "float32"], metadata, rank)


@dataclass(frozen=True)
class _File:
    """The LoRAs of one file by the name of their module, with the keys of the same that it would be written under."""

    header: Header
    parts: Mapping[str, tuple[SumPart, LoraKeys]]
    summary: LoraSummary

    @property
    def prefixes(self) -> frozenset[str]:
        """How its names begin."""
        return frozenset(
            next((prefix for prefix in PREFIXES if name.startswith(prefix)), "no prefix") for name in self.parts
        )


def _read(number: int, one: WeightedFile, allow_unmatched: bool) -> _File:
    """The LoRAs of one file.

    Raises:
        DiffSynthError: when it holds other things, unless they may be left out, or a half is missing or does not fit.
    """
    open_lora_file(one.path)
    header = read_header(one.path)
    refuse_other_adapters(one.path, header.tensors)
    keys, unmatched = _group(header.tensors)
    if not keys or (unmatched and not allow_unmatched):
        told = f"{len(unmatched)} of {len(header.tensors)} keys are of no LoRA: {shorten(sorted(unmatched))}"
        raise DiffSynthError(f"`{one.path}`: {told}", "name a LoRA, or leave these keys out with `--allow_unmatched`")
    stated = stated_scales(one.path, header)
    parts = {name: _part(number, one.path, header, name, of_one, stated) for name, of_one in keys.items()}
    summary = summarise(one, [part.part for part, _ in parts.values()], unmatched)
    return _File(header, parts, summary)


def _group(keys: Iterable[str]) -> tuple[dict[str, LoraKeys], list[str]]:
    """Keys by the name of their module, and those that are no LoRA's."""
    endings = {ALPHA: "alpha"}
    for dialect in DIALECTS.values():
        for down, up in [(dialect.down, dialect.up), *([dialect.also] if dialect.also else [])]:
            endings |= {down: "down", up: "up"}
    found: dict[str, dict[str, str]] = {}
    unmatched = []
    for key in keys:
        ending = max((text for text in endings if key.endswith(text)), key=len, default=None)
        place = found.setdefault(key.removesuffix(ending), {}) if ending else None
        if ending is None or place is None or endings[ending] in place:
            unmatched.append(key)
        else:
            place[endings[ending]] = key
    return {name: LoraKeys(**halves) for name, halves in sorted(found.items())}, unmatched


def _part(
    number: int, path: Path, header: Header, name: str, keys: LoraKeys, stated: Callable[[str, int], float]
) -> tuple[SumPart, LoraKeys]:
    if not keys.down or not keys.up:
        raise DiffSynthError(f"`{path}`: the LoRA of `{name}` lacks a half", "write the file anew")
    check_values(path, header.tensors, keys)
    down, up = header.tensors[keys.down].shape, header.tensors[keys.up].shape
    if len(down) < 2 or len(up) != len(down) or not down[0] or up[1] != down[0] or math.prod(up[2:]) != 1:
        raise DiffSynthError(
            f"`{path}`: the LoRA of `{name}` is {list(up)} x {list(down)}, which cannot be multiplied",
            "write the file anew",
        )
    return SumPart(number, LoraPart(keys, down[0], stated(keys.down, down[0])), down, up), keys


def _strangers(files: Sequence[WeightedFile], found: Sequence[_File]) -> list[Problem]:
    """Files whose names begin otherwise than those of the first: what is one module would be taken for two."""
    first = found[0].prefixes
    return [
        Problem(
            f"`{one.path}` names modules in another way ({', '.join(sorted(of_one.prefixes))}) than `{files[0].path}` "
            f"({', '.join(sorted(first))})",
            "bring them to one dialect with `diffsynth convert-lora`",
        )
        for one, of_one in zip(files, found, strict=True)
        if not of_one.prefixes & first
    ]


def _module(
    files: Sequence[WeightedFile], name: str, found: Sequence[tuple[SumPart, LoraKeys]], most: int | None
) -> SummedModule:
    """One module of the result, under the keys of the first file that has it, with an alpha if one of them has it."""
    parts = [part for part, _ in found]
    first = parts[0]
    for part in parts[1:]:
        if (part.down_shape[1:], part.up_shape[0]) != (first.down_shape[1:], first.up_shape[0]):
            raise DiffSynthError(
                f"`{name}` is another module in `{files[part.file].path}` "
                f"({list(part.up_shape)} x {list(part.down_shape)}) than in `{files[first.file].path}` "
                f"({list(first.up_shape)} x {list(first.down_shape)})",
                "name LoRAs of one model",
            )
    rank = sum(part.part.rank for part in parts)
    if most is not None and rank > most:
        rank = min(most, first.up_shape[0], math.prod(first.down_shape[1:]))
    alpha = next((keys.alpha for _, keys in found if keys.alpha), None)
    return SummedModule(name, tuple(parts), rank, LoraKeys(found[0][1].down, found[0][1].up, alpha))


def _common(headers: Sequence[Header]) -> dict[str, str]:
    """Metadata that all files have alike, but for those of one training."""
    first = headers[0].metadata
    return {
        key: value
        for key, value in first.items()
        if not key.startswith(OF_ONE_TRAINING) and all(header.metadata.get(key) == value for header in headers)
    }


def output_of(
    plan: SumPlan, sources: Mapping[str, Pieces] | None = None, hashes: InputHashes | None = None
) -> OutputFile:
    """The file to write. `sources`: what makes the bytes of its tensors, by key."""
    tensors = []
    for module in plan.modules:
        down, up = module.shapes
        assert module.keys.down and module.keys.up
        tensors += [(module.keys.down, plan.dtype, down), (module.keys.up, plan.dtype, up)]
        if module.keys.alpha:
            tensors.append((module.keys.alpha, "F32", ()))
    made = (OutputTensor(*tensor, source=(sources or {}).get(tensor[0], tuple)) for tensor in tensors)
    return OutputFile(
        plan.output, aligned(made), plan.told({}), late=(lambda: plan.told(hashes.wait())) if hashes else None
    )

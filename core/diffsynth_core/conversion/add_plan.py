"""What making one LoRA of several is going to do, from headers alone. No torch.

Where all files name their keys alike, the keys stay, and a module is one where its name is the same; so LoRAs of any
model can be added. Else the files are read as LoRAs of one family and component, and the result is written in the
dialect of the first file that has one.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.conversion.lora_inputs import LoraSummary, WeightedFile, open_lora_file, summarise
from diffsynth_core.conversion.lora_source import LoraSource, open_lora
from diffsynth_core.conversion.merge_plan import FORMATS
from diffsynth_core.conversion.provenance import InputHashes, merge_entry, with_entry
from diffsynth_core.errors import DiffSynthError, Problem, list_names, raise_if_any
from diffsynth_core.models.registry import FAMILIES
from diffsynth_core.weights.headers import Header, read_header
from diffsynth_core.weights.lora_files import ADAPTER_SETTINGS, read_stored
from diffsynth_core.weights.lora_names import (
    LoraKeys,
    LoraMatch,
    Vocabulary,
    fits_vocabulary,
    is_difference_key,
    refuse_other_adapters,
    split_lora_key,
    stem_keys,
)
from diffsynth_core.weights.lora_rows import ModuleLora, joint_rank, loras_of, translate, whole
from diffsynth_core.weights.weight_sets import ENDING
from diffsynth_core.weights.weight_writer import OutputFile, OutputTensor, Pieces, aligned

PREFIXES = (
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "lora_te",
    "diffusion_model.",
    "transformer.",
    "pipe.",
    "base_model.model.",
    "text_encoder",
)
"""How the names of modules begin in files of the dialects; where none does, there is no prefix."""
OF_ONE_TRAINING = ("ss_", "sshs_", ADAPTER_SETTINGS)
"""How metadata begin that are of the training of one file: its rank, its scale, its hash."""


@dataclass(frozen=True)
class SumPart:
    """The LoRA of one module in one file. `file`: its place among them."""

    file: int
    lora: ModuleLora

    @property
    def down_shape(self) -> tuple[int, ...]:
        """Of A."""
        return (joint_rank(self.lora), *loras_of(self.lora)[0].row_shape)

    @property
    def up_shape(self) -> tuple[int, ...]:
        """Of B."""
        rows = sum(span.end - span.begin for span in self.lora)
        return (rows, joint_rank(self.lora), *[1] * (len(self.down_shape) - 2))


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
    """LoRA files, and the modules of the one that is made of them. `dtype`: in safetensors' words. `dialect`: what the
    result is written in, where the files named their keys in several ways."""

    files: tuple[WeightedFile, ...]
    summaries: tuple[LoraSummary, ...]
    modules: tuple[SummedModule, ...]
    output: Path
    dtype: str
    metadata: Mapping[str, str]
    rank: int | None = None
    dialect: str | None = None

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
    family: str | None = None,
) -> SumPlan:
    """The plan of one LoRA made of several. `dtype` as in `FORMATS`; None: float32, in which nothing is rounded.

    Args:
        family: that of files which name their keys in several ways, where it is not told by them.

    Raises:
        FaultsFound: what is wrong with the files, or the name of the output.
    """
    problems: list[Problem] = []
    if output.suffix != ENDING:
        problems.append(
            Problem(
                f"`--output_path` `{output}` must be a single file",
                "use a name that ends in `.safetensors`",
                wrong_use=True,
            )
        )
    found = []
    for number, one in enumerate(files):
        try:
            found.append(_read(number, one, allow_unmatched))
        except DiffSynthError as error:
            problems += error.problems
    dialect = None
    if len(found) == len(files) and not _alike(found):
        try:
            found, dialect = _read_in_one_dialect(files, found, family, allow_unmatched)
        except DiffSynthError as error:
            problems += error.problems
    raise_if_any(problems)
    modules: dict[str, list[tuple[SumPart, LoraKeys]]] = {}
    for one_file in found:
        for name, part in one_file.parts.items():
            modules.setdefault(name, []).append(part)
    summed = tuple(_module(files, name, parts, rank) for name, parts in modules.items())
    metadata = _common([one_file.header for one_file in found])
    summaries = tuple(one_file.summary for one_file in found)
    return SumPlan(tuple(files), summaries, summed, output, FORMATS[dtype or "float32"], metadata, rank, dialect)


@dataclass(frozen=True)
class _File:
    """The LoRAs of one file by the name of their module, with the keys of the same that it would be written under."""

    header: Header
    parts: Mapping[str, tuple[SumPart, LoraKeys]]
    summary: LoraSummary

    @property
    def prefixes(self) -> frozenset[str]:
        """How its names begin, and whether they have underscores in the place of dots."""
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
        told = f"{len(unmatched)} of {len(header.tensors)} keys are not LoRA keys: {list_names(sorted(unmatched))}"
        whole_tensors = any(map(is_difference_key, unmatched))
        raise DiffSynthError(
            f"`{one.path}`: {told}",
            "merge it into its base with `--base`" + (", or skip these keys with `--allow_unmatched`" if keys else "")
            if whole_tensors
            else "pass a LoRA, or skip these keys with `--allow_unmatched`",
        )
    loras, _ = read_stored(one.path, header, LoraMatch(Vocabulary(""), keys))
    parts = {name: (SumPart(number, whole(lora)), keys[name]) for name, lora in loras.items()}
    return _File(header, parts, summarise(one, list(loras.values()), unmatched))


def _group(keys: Iterable[str]) -> tuple[dict[str, LoraKeys], list[str]]:
    """Keys by the name of their module, and those that are no LoRA's."""
    found: dict[str, dict[str, str]] = {}
    unmatched = []
    for key in keys:
        half = split_lora_key(key)
        if half is None or half[1] in found.get(half[0], {}):
            unmatched.append(key)
        else:
            found.setdefault(half[0], {})[half[1]] = key
    return {name: LoraKeys(**halves) for name, halves in sorted(found.items())}, unmatched


def _alike(found: Sequence[_File]) -> bool:
    """Whether all files name their modules in the same way: else what is one module would be taken for two."""
    if any(not of_one.prefixes & found[0].prefixes for of_one in found):
        return False
    fits = [_vocabularies(of_one.header.tensors) for of_one in found]
    return any(not of_one for of_one in fits) or bool(frozenset.intersection(*fits))


def _vocabularies(keys: Collection[str]) -> frozenset[tuple[str, str]]:
    """(family, set of names) of those that have a module for each key."""
    namings = {name: facts.component(facts.denoiser).lora_naming for name, facts in FAMILIES.items()}
    return frozenset(
        (family, vocabulary.title)
        for family, naming in namings.items()
        for vocabulary in naming.vocabularies
        if fits_vocabulary(keys, naming.modules_met(keys), vocabulary, naming)
    )


def _read_in_one_dialect(
    files: Sequence[WeightedFile], found: Sequence[_File], family: str | None, allow_unmatched: bool
) -> tuple[list[_File], str]:
    """Files that name their keys in several ways, in the dialect of the first that has one.

    Raises:
        DiffSynthError: as `open_lora`; when they are of several components.
    """
    sources = [open_lora(open_lora_file(one.path), family, None, allow_unmatched) for one in files]
    first = sources[0]
    for source, one in zip(sources, files, strict=True):
        if (source.facts, source.naming.component) != (first.facts, first.naming.component):
            raise DiffSynthError(
                f"`{one.path}` is a LoRA for {source.title}, but `{files[0].path}` is for {first.title}",
                "pass LoRAs for one model",
            )
    dialect = next((source.dialect for source in sources if source.dialect), "diffsynth")
    return [
        _in_dialect(number, one, of_one, source, dialect)
        for number, (one, of_one, source) in enumerate(zip(files, found, sources, strict=True))
    ], dialect


def _in_dialect(number: int, one: WeightedFile, read: _File, source: LoraSource, dialect: str) -> _File:
    """The same LoRAs by the names of modules in a dialect."""
    modules = translate(source.loras, source.vocabulary, source.naming.vocabulary(dialect))
    parts = {}
    for name, lora in modules.items():
        keys = stem_keys(name, dialect)
        parts[name] = SumPart(number, lora), keys
    return _File(read.header, parts, summarise(one, list(source.loras.values()), source.unmatched))


def _module(
    files: Sequence[WeightedFile], name: str, found: Sequence[tuple[SumPart, LoraKeys]], most: int | None
) -> SummedModule:
    """One module of the result, under the keys of the first file that has it, with an alpha if one of them has it."""
    parts = [part for part, _ in found]
    first = parts[0]
    for part in parts[1:]:
        if (part.down_shape[1:], part.up_shape[0]) != (first.down_shape[1:], first.up_shape[0]):
            raise DiffSynthError(
                f"`{name}` has other shapes in `{files[part.file].path}` "
                f"({list(part.up_shape)} x {list(part.down_shape)}) than in `{files[first.file].path}` "
                f"({list(first.up_shape)} x {list(first.down_shape)})",
                "pass LoRAs for one model",
            )
    rank = sum(part.down_shape[0] for part in parts)
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

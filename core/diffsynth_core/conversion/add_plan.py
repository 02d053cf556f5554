"""The plan of making one LoRA of several, from headers alone. No torch.

If all files name their keys alike, the keys stay, and modules are identified by name; so LoRAs of any model can be
added. Else the files are read as LoRAs of one family and component, and the result is written in the format of the
first file that has one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffsynth_core.config.choices import LoraFormat, WeightDtype
from diffsynth_core.conversion.lora_inputs import WeightedLora, open_lora_file
from diffsynth_core.conversion.lora_source import RecognizedLora, open_lora
from diffsynth_core.conversion.merge_plan import FORMATS
from diffsynth_core.conversion.provenance import InputHashes, merge_entry, with_entry
from diffsynth_core.errors import DiffSynthError, Problem, list_names, raise_if_any
from diffsynth_core.models.recognition import lora_vocabularies
from diffsynth_core.progress import pluralize, verb
from diffsynth_core.weights.headers import Header, read_header
from diffsynth_core.weights.lora import ModuleLora, joint_rank, lora_shapes
from diffsynth_core.weights.lora_files import ADAPTER_SETTINGS, read_matched_lora
from diffsynth_core.weights.lora_formats import LoraKeys, keys_of_part
from diffsynth_core.weights.lora_keys import (
    is_difference_key,
    match_lora_keys,
    refuse_other_adapters,
)
from diffsynth_core.weights.weight_sets import ENDING
from diffsynth_core.weights.weight_writer import OutputFile, OutputTensor, Pieces, aligned
from diffsynth_core.weights.weighted_files import WeightedFile

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
"""Prefixes of module names in files of the formats; a name with none of them has no prefix."""
OF_ONE_TRAINING = ("ss_", "sshs_", "modelspec.title", "modelspec.hash_", ADAPTER_SETTINGS)
"""Prefixes of metadata keys about the training of one file: its rank, its scale, its title, its hash."""


@dataclass(frozen=True)
class ModulePart:
    """The LoRA of one module in one file. `file`: the index of the file."""

    file: int
    lora: ModuleLora


@dataclass(frozen=True)
class SummedModule:
    """A module of the result: its LoRAs in the files, the rank of their sum, and its keys.

    `shapes`: of A and B in the result.
    """

    name: str
    parts: tuple[ModulePart, ...]
    rank: int
    keys: LoraKeys
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class AddPlan:
    """LoRA files, and the modules of the one that is made of them.

    `dtype`: as safetensors names it. `lora_format`: that of the result if the files have several.
    """

    loras: tuple[WeightedLora, ...]
    modules: tuple[SummedModule, ...]
    output: Path
    dtype: str
    metadata: Mapping[str, str]
    rank: int | None = None
    lora_format: LoraFormat | None = None

    @property
    def inputs(self) -> tuple[Path, ...]:
        """All files that are read."""
        return tuple(dict.fromkeys(one.lora.path for one in self.loras))

    def metadata_with(self, hashes: Mapping[Path, str]) -> dict[str, str]:
        """The metadata of the result, with the sha256 of its inputs."""
        loras = [(one.lora.path, one.weight) for one in self.loras]
        settings = {"rank": self.rank} if self.rank else {}
        return with_entry(self.metadata, merge_entry((), loras, hashes, **settings))


def plan_addition(
    files: Sequence[WeightedFile],
    output: Path,
    rank: int | None = None,
    dtype: WeightDtype | None = None,
    allow_unmatched: bool = False,
    family: str | None = None,
) -> AddPlan:
    """The plan of one LoRA made of several.

    Args:
        dtype: None for float32, in which nothing is rounded.
        family: that of files with several key formats, if they do not reveal it.

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
    for one in files:
        try:
            found.append(_read(one, allow_unmatched))
        except DiffSynthError as error:
            problems += error.problems
    lora_format = None
    if len(found) == len(files) and not _have_same_names(found):
        try:
            found, lora_format = _read_in_one_format(files, found, family, allow_unmatched)
        except DiffSynthError as error:
            problems += error.problems
    raise_if_any(problems)
    metadata = _common([file.header for file in found])
    loras = tuple(file.given for file in found)
    return AddPlan(loras, _sum_modules(found, rank), output, FORMATS[dtype or "float32"], metadata, rank, lora_format)


@dataclass(frozen=True)
class _File:
    """A file: the LoRA of each module, and the keys that it would have in the result, by the module's name there."""

    given: WeightedLora
    header: Header
    modules: Mapping[str, ModuleLora]
    keys: Mapping[str, LoraKeys]

    @property
    def prefixes(self) -> frozenset[str]:
        """The prefixes of its names, which differ too in whether they have underscores in place of dots."""
        return frozenset(
            next((prefix for prefix in PREFIXES if name.startswith(prefix)), "no prefix") for name in self.modules
        )


def _read(given: WeightedFile, allow_unmatched: bool) -> _File:
    """The LoRAs of one file, whatever the model.

    Raises:
        DiffSynthError: when it has other keys, unless they may be skipped, or A or B is missing or does not match.
    """
    open_lora_file(given.path)
    header = read_header(given.path)
    refuse_other_adapters(given.path, header.tensors)
    match = match_lora_keys(header.tensors, None)
    if not match.loras or (match.unmatched and not allow_unmatched):
        number = len(match.unmatched)
        what = verb(number, "is not a LoRA key", "are not LoRA keys")
        unmatched = f"{number} of {pluralize(len(header.tensors), 'key')} {what}"
        differences = any(map(is_difference_key, match.unmatched))
        raise DiffSynthError(
            f"`{given.path}`: {unmatched}: {list_names(sorted(match.unmatched))}",
            "merge it into its base with `--base`"
            + (", or skip these keys with `--allow_unmatched`" if match.loras else "")
            if differences
            else "pass a LoRA, or skip these keys with `--allow_unmatched`",
        )
    match = replace(match, loras=dict(sorted(match.loras.items())))
    lora = read_matched_lora(given.path, header, match)
    return _File(WeightedLora(lora, given.weight), header, lora.modules, match.loras)


def _have_same_names(found: Sequence[_File]) -> bool:
    """Whether all files name their modules alike: else one module would be taken for two."""
    if any(not file.prefixes & found[0].prefixes for file in found):
        return False
    possible = [lora_vocabularies(file.header.tensors) for file in found]
    return any(not of_one for of_one in possible) or bool(frozenset.intersection(*possible))


def _read_in_one_format(
    files: Sequence[WeightedFile], found: Sequence[_File], family: str | None, allow_unmatched: bool
) -> tuple[list[_File], LoraFormat]:
    """Files with several key formats, in that of the first that has one.

    Raises:
        DiffSynthError: as `open_lora`; when they are for several components.
    """
    sources = [open_lora(open_lora_file(one.path), family, None, allow_unmatched) for one in files]
    first = sources[0]
    for source, one in zip(sources, files, strict=True):
        if (source.facts, source.naming.component) != (first.facts, first.naming.component):
            raise DiffSynthError(
                f"`{one.path}` is a LoRA for {source.title}, but `{files[0].path}` is for {first.title}",
                "pass LoRAs for one model",
            )
    known = [source.lora_format for source in sources if source.lora_format]
    lora_format: LoraFormat = known[0] if known else "diffsynth"
    return [_in_format(file, source, lora_format) for file, source in zip(found, sources, strict=True)], lora_format


def _in_format(file: _File, source: RecognizedLora, lora_format: LoraFormat) -> _File:
    """The same LoRAs by the names of modules in a format."""
    modules = source.lora.in_vocabulary(source.naming.vocabulary(lora_format))
    keys = {name: keys_of_part(name, lora_format) for name in modules}
    return _File(WeightedLora(source.lora, file.given.weight), file.header, modules, keys)


def _sum_modules(files: Sequence[_File], max_rank: int | None) -> tuple[SummedModule, ...]:
    """The modules of the result, in the order of the files."""
    parts: dict[str, list[ModulePart]] = {}
    for number, file in enumerate(files):
        for name, lora in file.modules.items():
            parts.setdefault(name, []).append(ModulePart(number, lora))
    return tuple(_sum_module(files, name, own, max_rank) for name, own in parts.items())


def _sum_module(files: Sequence[_File], name: str, parts: Sequence[ModulePart], max_rank: int | None) -> SummedModule:
    """One module, with the keys of the first file that has it, and an alpha if one of the files has it.

    Raises:
        DiffSynthError: when its shapes differ between files.
    """
    first_a, first_b = lora_shapes(parts[0].lora)
    for part in parts[1:]:
        a, b = lora_shapes(part.lora)
        if (a[1:], b[0]) != (first_a[1:], first_b[0]):
            raise DiffSynthError(
                f"`{name}` has other shapes in `{files[part.file].given.lora.path}` ({list(b)} x {list(a)}) than in "
                f"`{files[parts[0].file].given.lora.path}` ({list(first_b)} x {list(first_a)})",
                "pass LoRAs for one model",
            )
    rank = sum(joint_rank(part.lora) for part in parts)
    if max_rank is not None and rank > max_rank:
        rank = min(max_rank, first_b[0], math.prod(first_a[1:]))
    keys = [files[part.file].keys[name] for part in parts]
    alpha = next((one.alpha for one in keys if one.alpha), None)
    shapes = (rank, *first_a[1:]), (first_b[0], rank, *first_b[2:])
    return SummedModule(name, tuple(parts), rank, replace(keys[0], alpha=alpha), shapes)


def _common(headers: Sequence[Header]) -> dict[str, str]:
    """Metadata that is equal in all files, apart from that about the training of one."""
    first = headers[0].metadata
    return {
        key: value
        for key, value in first.items()
        if not key.startswith(OF_ONE_TRAINING) and all(header.metadata.get(key) == value for header in headers)
    }


def output_of(
    plan: AddPlan, sources: Mapping[str, Pieces] | None = None, hashes: InputHashes | None = None
) -> OutputFile:
    """The file to write. `sources`: the functions that make the bytes of its tensors, by key."""
    tensors = []
    for module in plan.modules:
        a, b = module.shapes
        assert module.keys.A and module.keys.B
        tensors += [(module.keys.A, plan.dtype, a), (module.keys.B, plan.dtype, b)]
        if module.keys.alpha:
            tensors.append((module.keys.alpha, "F32", ()))
    made = (OutputTensor(*tensor, source=(sources or {}).get(tensor[0], tuple)) for tensor in tensors)
    late = (lambda: plan.metadata_with(hashes.wait())) if hashes else None
    return OutputFile(plan.output, aligned(made), plan.metadata_with({}), late=late)

"""A LoRA file without the base that it is for: its family, its dialect, its modules. No torch."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from diffsynth_core.conversion.lora_inputs import TEXT_ENCODERS, read_number
from diffsynth_core.conversion.lora_rows import StoredLora, StoredTensor
from diffsynth_core.errors import DiffSynthError, FaultsFound, Problem, shorten
from diffsynth_core.families.interface import FamilyFacts
from diffsynth_core.families.table import FAMILIES, unknown_family
from diffsynth_core.progress import count_of
from diffsynth_core.state_dicts.headers import Header, read_header
from diffsynth_core.state_dicts.lora_files import WRITE_ANEW, check_values, stated_scales
from diffsynth_core.state_dicts.lora_names import (
    DIALECTS,
    LoraKeys,
    LoraNaming,
    is_lora_key,
    match_lora_keys,
    refuse_other_adapters,
)
from diffsynth_core.state_dicts.values import all_finite
from diffsynth_core.state_dicts.weight_sets import WeightSet

_COMPONENT = re.compile(r"^pipe\.(\w+)\.")


@dataclass(frozen=True)
class LoraSource:
    """A LoRA file whose modules are known. `loras`: by the names that its dialect has for modules.

    `unmatched`: keys that are of no module, which are left out.
    """

    weights: WeightSet
    facts: FamilyFacts
    naming: LoraNaming
    dialect: str
    loras: Mapping[str, StoredLora]
    unmatched: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What messages call the component that it is for."""
        return f"the {self.naming.component} of {self.facts.title}"


@dataclass(frozen=True)
class _Reading:
    """One way to understand the keys of a file."""

    facts: FamilyFacts
    naming: LoraNaming
    dialect: str
    found: Mapping[str, tuple[LoraKeys, ...]]
    unmatched: list[str]


def open_lora(
    weights: WeightSet, family: str | None, component: str | None, allow_unmatched: bool = False
) -> LoraSource:
    """The LoRA that a file holds, understood by its metadata, what the user says, or the names of its modules.

    Raises:
        DiffSynthError: when it holds another adapter, its keys fit no family or several, some fit no module and that is
            not allowed, halves are missing or do not fit each other, or a value is no finite number.
    """
    refuse_other_adapters(weights.origin, weights.tensors)
    families = _families(weights, family)
    named = _component(weights, component)
    readings = [
        _Reading(facts, naming, dialect, *match_lora_keys(weights.tensors, modules, dialect, naming))
        for facts, naming in _namings(families, named)
        for modules in [naming.modules_met(weights.tensors)]
        for dialect in filter(naming.known, DIALECTS)
    ]
    reading = _best(weights, readings, families)
    if reading.unmatched and not allow_unmatched:
        raise _unmatched(weights, reading)
    return LoraSource(
        weights, reading.facts, reading.naming, reading.dialect, _read(weights, reading), tuple(reading.unmatched)
    )


def _families(weights: WeightSet, family: str | None) -> list[FamilyFacts]:
    """Those that a file may be of."""
    if family is not None and family not in FAMILIES:
        raise FaultsFound([unknown_family(family)])
    said = weights.said("family")
    if family and said in FAMILIES and said != family:
        raise DiffSynthError(
            f"`{weights.origin}` says of itself that it is of `{said}`, `--family` says `{family}`",
            "leave `--family` out, or name another file",
        )
    known = family or said
    return [FAMILIES[known]] if known in FAMILIES else list(FAMILIES.values())


def _component(weights: WeightSet, component: str | None) -> str | None:
    """The component that is named, in the command, the metadata or the keys."""
    in_keys = {match[1] for match in map(_COMPONENT.match, filter(is_lora_key, weights.tensors)) if match}
    return component or weights.said("lora_component") or (in_keys.pop() if len(in_keys) == 1 else None)


def _namings(families: list[FamilyFacts], component: str | None) -> list[tuple[FamilyFacts, LoraNaming]]:
    """How files name the modules of a component in each family that has it; a second transformer has the names of the
    first.

    Raises:
        FaultsFound: for components that the dialects have no names for.
    """
    found = []
    for facts in families:
        naming = facts.component(facts.denoiser).lora_naming
        if component in (None, facts.denoiser):
            found.append((facts, naming))
        elif component == facts.second_denoiser:
            found.append((facts, replace(naming, component=component)))
    if not found:
        known = {name: None for facts in families for name in (facts.denoiser, facts.second_denoiser) if name}
        raise FaultsFound(
            [
                Problem(
                    f"a LoRA of `{component}` has the same names in all dialects of "
                    f"{', '.join(facts.title for facts in families)}, if any",
                    f"name a LoRA of {' or '.join(known)}",
                    wrong_use=True,
                )
            ]
        )
    return found


def _best(weights: WeightSet, readings: list[_Reading], families: list[FamilyFacts]) -> _Reading:
    """The reading that explains most keys.

    Raises:
        DiffSynthError: when none explains any, or those of several families explain as many.
    """
    fewest = min(len(reading.unmatched) for reading in readings)
    best = [reading for reading in readings if len(reading.unmatched) == fewest]
    if fewest == len(weights.tensors):
        known = ", ".join(facts.title for facts in families)
        raise DiffSynthError(
            f"`{weights.origin}`: none of its {fewest} keys fits a module of {known}: {shorten(sorted(weights.tensors))}",
            "name a LoRA file" if not any(map(is_lora_key, weights.tensors)) else "name a LoRA of one of them",
        )
    names = list(dict.fromkeys(reading.facts.name for reading in best))
    if len(names) > 1:
        raise DiffSynthError(
            f"`{weights.origin}` may be a LoRA of {' or '.join(names)}: all its modules have the same names in each",
            f"give `--family`, one of {', '.join(names)}",
        )
    return best[0]


def _unmatched(weights: WeightSet, reading: _Reading) -> DiffSynthError:
    unmatched = sorted(reading.unmatched)
    component = f"the {reading.naming.component} of {reading.facts.title}"
    message = (
        f"`{weights.origin}`: {len(unmatched)} of {len(weights.tensors)} keys fit no module of {component}: "
        f"{shorten(unmatched)}"
    )
    if not any(map(is_lora_key, unmatched)):
        return DiffSynthError(message, "take the file apart with `diffsynth split-ckpt`, and convert its LoRA")
    encoder = sum(key.startswith(TEXT_ENCODERS) for key in unmatched)
    told = f" ({encoder} are of a text encoder)" if encoder else ""
    return DiffSynthError(message + told, "leave them out with `--allow_unmatched`, or name another file")


def _read(weights: WeightSet, reading: _Reading) -> dict[str, StoredLora]:
    """The LoRAs of a file, by the names of their modules in its dialect."""
    (path,) = weights.files
    header = read_header(path)
    stated = stated_scales(path, header)
    loras = {}
    for module, parts in reading.found.items():
        own = [parts[0].fused] if parts[0].fused else reading.naming.names(reading.dialect).ours(module) or ()
        for name, keys in zip(own, parts, strict=True):
            if keys != LoraKeys() and name not in loras:
                loras[name] = _stored(weights, header, name, keys, stated)
    not_finite = [
        key
        for key, tensor in weights.tensors.items()
        if key not in reading.unmatched and not all_finite(weights.spans[key], tensor.dtype)
    ]
    if not_finite:
        raise DiffSynthError(
            f"`{weights.origin}`: {count_of(len(not_finite), 'tensor')} with NaN or infinity: {shorten(not_finite)}",
            "name an earlier checkpoint",
        )
    return loras


def _stored(
    weights: WeightSet, header: Header, module: str, keys: LoraKeys, stated: Callable[[str, int], float]
) -> StoredLora:
    """One LoRA, whose halves must be there and fit each other."""
    if not keys.down or not keys.up:
        raise DiffSynthError(f"`{weights.origin}`: the LoRA of `{module}` lacks a half", WRITE_ANEW)
    check_values(weights.origin, weights.tensors, keys)
    down, up = (
        StoredTensor(weights.tensors[key].dtype, weights.tensors[key].shape, weights.spans[key])
        for key in (keys.down, keys.up)
    )
    sides, rank = len(down.shape), down.shape[0] if down.shape else 0
    if sides < 2 or not rank or not up.shape or not up.shape[0] or up.shape[1:] != (rank, *[1] * (sides - 2)):
        raise DiffSynthError(
            f"`{weights.origin}`: the halves of the LoRA of `{module}` do not fit each other: {list(up.shape)} and "
            f"{list(down.shape)}",
            WRITE_ANEW,
        )
    scale = stated(keys.down, rank)
    if keys.alpha:
        return StoredLora(module, down, up, read_number(weights.files[0], header, keys.alpha))
    return StoredLora(module, down, up, None if scale == 1 else scale * rank)

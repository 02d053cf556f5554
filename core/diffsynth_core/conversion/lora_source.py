"""A LoRA file without the base that it is for: its family, its names, its modules. No torch.

The family is decided by all that fits, the names of modules, and by all that rules out: the sides of weights, and
numbers of blocks that no published model has. Where several are left the user is asked.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from diffsynth_core.config.choices import LoraFormat
from diffsynth_core.errors import DiffSynthError, FaultsFound, Problem, list_names
from diffsynth_core.models.registry import FAMILIES, unknown_family
from diffsynth_core.models.spec import ComponentFacts, FamilyFacts
from diffsynth_core.progress import pluralize
from diffsynth_core.weights.headers import TensorHeader, read_header
from diffsynth_core.weights.lora import Lora
from diffsynth_core.weights.lora_files import read_matched_lora
from diffsynth_core.weights.lora_formats import TEXT_ENCODER_PREFIXES, LoraKeys, LoraNaming
from diffsynth_core.weights.lora_keys import (
    LoraMatch,
    is_difference_key,
    is_lora_key,
    match_lora_keys,
    refuse_other_adapters,
)
from diffsynth_core.weights.values import all_finite
from diffsynth_core.weights.weight_sets import WeightSet

_COMPONENT = re.compile(r"^pipe\.(\w+)\.")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class RecognisedLora:
    """A LoRA file whose family and component are known. `lora`: without the keys that match no module."""

    weights: WeightSet
    facts: FamilyFacts
    naming: LoraNaming
    lora: Lora

    @property
    def title(self) -> str:
        """The component that it is for, as messages name it."""
        return f"the {self.facts.title} {self.naming.component}"

    @property
    def lora_format(self) -> LoraFormat | None:
        """Its format; None: its prefix, names and endings are not those of one."""
        return self.lora.match.lora_format(self.naming)

    @property
    def spelling(self) -> str:
        """Its format, or how its keys are named, in words."""
        names = self.lora.match.vocabulary.title.partition("/")[0]
        prefixes = " and ".join(
            f"prefix `{prefix}`" if prefix else "no prefix" for prefix in sorted(self.lora.match.prefixes)
        )
        return self.lora_format or f"{names} names with {prefixes}"


@dataclass(frozen=True)
class _Reading:
    """One way to match the keys of a file."""

    facts: FamilyFacts
    naming: LoraNaming
    match: LoraMatch

    @property
    def unmatched(self) -> tuple[str, ...]:
        return self.match.unmatched


def open_lora(
    weights: WeightSet, family: str | None, component: str | None, allow_unmatched: bool = False
) -> RecognisedLora:
    """The LoRA that a file holds, understood by its metadata, what the user says, or the names of its modules.

    Raises:
        DiffSynthError: when it holds another adapter, its keys fit no family or several, some fit no module and that is
            not allowed, halves are missing or do not fit each other, or a value is no finite number.
    """
    refuse_other_adapters(weights.origin, weights.tensors)
    families = _families(weights, family)
    named = _component(weights, component)
    readings = [
        _Reading(facts, naming, match_lora_keys(weights.tensors, naming.modules_met(weights.tensors), naming))
        for facts, naming in _namings(families, named)
    ]
    reading = _best(weights, readings, families)
    if reading.unmatched and not allow_unmatched:
        raise _unmatched(weights, reading)
    return RecognisedLora(weights, reading.facts, reading.naming, _read(weights, reading))


def _families(weights: WeightSet, family: str | None) -> list[FamilyFacts]:
    """Those that a file may be of."""
    if family is not None and family not in FAMILIES:
        raise FaultsFound([unknown_family(family)])
    said = weights.metadata_value("family")
    if family and said in FAMILIES and said != family:
        raise DiffSynthError(
            f"the metadata of `{weights.origin}` states the family `{said}`, but `--family` is `{family}`",
            "remove `--family`, or pass another file",
        )
    known = family or said
    return [FAMILIES[known]] if known in FAMILIES else list(FAMILIES.values())


def _component(weights: WeightSet, component: str | None) -> str | None:
    """The component that is named, in the command, the metadata or the keys."""
    in_keys = {match[1] for match in map(_COMPONENT.match, filter(is_lora_key, weights.tensors)) if match}
    return component or weights.metadata_value("lora_component") or (in_keys.pop() if len(in_keys) == 1 else None)


def _namings(families: list[FamilyFacts], component: str | None) -> list[tuple[FamilyFacts, LoraNaming]]:
    """How files name the modules of a component in each family that has it; a second transformer has the names of the
    first.

    Raises:
        FaultsFound: for components that no format has names for.
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
                    f"a LoRA of `{component}` cannot be renamed: no LoRA format defines key names for it in "
                    f"{', '.join(facts.title for facts in families)}",
                    f"pass a LoRA of {' or '.join(known)}",
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
        if all(map(is_difference_key, weights.tensors)):
            raise DiffSynthError(
                f"`{weights.origin}` contains only full-weight differences, which no LoRA format can store: "
                f"{list_names(sorted(weights.tensors))}",
                "merge the file into its base with `diffsynth merge-lora --base`",
            )
        raise DiffSynthError(
            f"`{weights.origin}`: none of its {fewest} keys matches a module of {known}: {list_names(sorted(weights.tensors))}",
            "pass a LoRA file" if not any(map(is_lora_key, weights.tensors)) else "pass a LoRA for one of them",
        )
    possible = [reading for reading in best if not _is_ruled_out(reading, weights.tensors)] or best
    names = [reading.facts.name for reading in possible]
    if len(names) > 1:
        raise DiffSynthError(
            f"`{weights.origin}` may be a LoRA of {' or '.join(names)}: its module names are the same in each",
            f"pass `--family`, one of {', '.join(names)}",
        )
    return possible[0]


def _is_ruled_out(reading: _Reading, tensors: Mapping[str, TensorHeader]) -> bool:
    """Whether the sides of a weight, or the number of a block, are none of the family's."""
    return any(
        _is_beyond_the_last_block(whole, reading.facts.component(reading.facts.denoiser))
        for name in reading.match.loras
        for whole in reading.match.vocabulary.public(name)
    ) or any(_has_other_sides(name, keys, reading, tensors) for name, keys in reading.match.loras.items())


def _is_beyond_the_last_block(module: str, component: ComponentFacts) -> bool:
    """Whether a public module is in a block that no published model has."""
    for start, count in component.blocks.items():
        number = module.removeprefix(start).partition(".")[0]
        if module.startswith(start) and number.isdigit() and int(number) >= count:
            return True
    return False


def _has_other_sides(name: str, keys: LoraKeys, reading: _Reading, tensors: Mapping[str, TensorHeader]) -> bool:
    """Whether rows and columns of a weight stand in another relation than in the family; False where it is not known.

    Parts of a module tell nothing, and neither does what is several modules together.
    """
    vocabulary = reading.match.vocabulary
    wholes = vocabulary.public(name)
    if len(wholes) != 1 or len(vocabulary.parts(wholes[0])) != 1 or not keys.A or not keys.B:
        return False
    expected = reading.facts.component(reading.facts.denoiser).sides.get(_NUMBER.sub("{}", wholes[0], count=1))
    a, b = tensors[keys.A].shape, tensors[keys.B].shape
    if expected is None or len(a) != 2 or len(b) != 2:
        return False
    rows, columns = expected
    return b[0] * columns != a[1] * rows


def _unmatched(weights: WeightSet, reading: _Reading) -> DiffSynthError:
    unmatched = sorted(reading.unmatched)
    component = f"the {reading.facts.title} {reading.naming.component}"
    message = (
        f"`{weights.origin}`: {len(unmatched)} of {len(weights.tensors)} keys match no module of {component}: "
        f"{list_names(unmatched)}"
    )
    differences = [key for key in unmatched if is_difference_key(key)]
    if len(differences) == len(unmatched):
        return DiffSynthError(
            f"`{weights.origin}` contains {pluralize(len(differences), 'full-weight difference')} besides the LoRA of "
            f"{component}, which no LoRA format can store: {list_names(differences)}",
            "merge the file into its base with `diffsynth merge-lora --base`, or skip them with `--allow_unmatched`",
        )
    if not any(map(is_lora_key, unmatched)):
        return DiffSynthError(message, "split the file with `diffsynth split-ckpt`, and convert its LoRA")
    encoder = sum(key.startswith(TEXT_ENCODER_PREFIXES) for key in unmatched)
    of_encoder = f" ({encoder} of them for a text encoder)" if encoder else ""
    return DiffSynthError(message + of_encoder, "skip them with `--allow_unmatched`, or pass another file")


def _read(weights: WeightSet, reading: _Reading) -> Lora:
    """The LoRA of a file, if all its values are finite."""
    (path,) = weights.files
    lora = read_matched_lora(path, read_header(path), reading.match)
    not_finite = [
        key
        for key, tensor in weights.tensors.items()
        if key not in reading.unmatched and not all_finite(weights.spans[key], tensor.dtype)
    ]
    if not_finite:
        raise DiffSynthError(
            f"`{weights.origin}`: {pluralize(len(not_finite), 'tensor')} with NaN or Inf: {list_names(not_finite)}",
            "use an earlier checkpoint",
        )
    return lora

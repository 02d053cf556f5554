"""Opening a LoRA file without its base: its family, its names, its modules. No torch.

The family is that of the metadata, or whose module names match, as long as the shapes of weights and the numbers of
blocks are possible in it. If several remain, the user has to say which.
"""

import re
from dataclasses import dataclass

from diffsynth_core.config.choices import LoraFormat
from diffsynth_core.errors import DiffSynthError, FaultsFound, Problem, list_names
from diffsynth_core.models.recognition import LoraReading, best_readings, read_lora_keys
from diffsynth_core.models.registry import FAMILIES, unknown_family
from diffsynth_core.models.spec import FamilyFacts
from diffsynth_core.progress import pluralize, verb
from diffsynth_core.weights.headers import read_header
from diffsynth_core.weights.lora import Lora
from diffsynth_core.weights.lora_files import read_matched_lora
from diffsynth_core.weights.lora_formats import TEXT_ENCODER_PREFIXES, LoraNaming
from diffsynth_core.weights.lora_keys import is_difference_key, is_lora_key, refuse_other_adapters
from diffsynth_core.weights.values import all_finite
from diffsynth_core.weights.weight_sets import WeightSet

_COMPONENT = re.compile(r"^pipe\.(\w+)\.")


@dataclass(frozen=True)
class RecognizedLora:
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


def open_lora(
    weights: WeightSet, family: str | None, component: str | None, allow_unmatched: bool = False
) -> RecognizedLora:
    """The LoRA in a file, of the family and component given, else of those in its metadata, else by its keys.

    Raises:
        DiffSynthError: when it is another adapter, its keys match no family or several, some match no module and that
            is not allowed, A or B is missing, they do not match, or a value is not finite.
    """
    refuse_other_adapters(weights.origin, weights.tensors)
    families = _families(weights, family)
    named = _component(weights, component)
    readings = read_lora_keys(weights.tensors, families, named)
    if not readings:
        raise FaultsFound([_no_names(named, families)])
    reading = _best(weights, readings, families)
    if reading.match.unmatched and not allow_unmatched:
        raise _unmatched(weights, reading)
    return RecognizedLora(weights, reading.facts, reading.naming, _read(weights, reading))


def _families(weights: WeightSet, family: str | None) -> list[FamilyFacts]:
    """The families that are possible by the option and the metadata."""
    if family is not None and family not in FAMILIES:
        raise FaultsFound([unknown_family(family)])
    stated = weights.metadata_value("family")
    if family and stated in FAMILIES and stated != family:
        raise DiffSynthError(
            f"the metadata of `{weights.origin}` states the family `{stated}`, but `--family` is `{family}`",
            "remove `--family`, or pass another file",
        )
    known = family or stated
    return [FAMILIES[known]] if known in FAMILIES else list(FAMILIES.values())


def _component(weights: WeightSet, component: str | None) -> str | None:
    """The component according to the option, the metadata or the prefix of the keys."""
    in_keys = {match[1] for match in map(_COMPONENT.match, filter(is_lora_key, weights.tensors)) if match}
    return component or weights.metadata_value("lora_component") or (in_keys.pop() if len(in_keys) == 1 else None)


def _no_names(component: str | None, families: list[FamilyFacts]) -> Problem:
    """The problem that no format has names for a component."""
    known = {name: None for facts in families for name in (facts.denoiser, facts.second_denoiser) if name}
    return Problem(
        f"a LoRA of `{component}` cannot be renamed: no LoRA format defines key names for it in "
        f"{', '.join(facts.title for facts in families)}",
        f"pass a LoRA of {' or '.join(known)}",
        wrong_use=True,
    )


def _best(weights: WeightSet, readings: list[LoraReading], families: list[FamilyFacts]) -> LoraReading:
    """The reading that explains most keys.

    Raises:
        DiffSynthError: when none explains any, or those of several families explain as many.
    """
    possible = best_readings(readings, weights.tensors)
    if len(possible[0].match.unmatched) == len(weights.tensors):
        raise _unknown(weights, families)
    names = [reading.facts.name for reading in possible]
    if len(names) > 1:
        raise DiffSynthError(
            f"`{weights.origin}` may be a LoRA of {' or '.join(names)}: its module names are the same in each",
            f"pass `--family`, one of {', '.join(names)}",
        )
    return possible[0]


def _unknown(weights: WeightSet, families: list[FamilyFacts]) -> DiffSynthError:
    keys = sorted(weights.tensors)
    if all(map(is_difference_key, keys)):
        return DiffSynthError(
            f"`{weights.origin}` contains only full-weight differences, which no LoRA format can store: "
            f"{list_names(keys)}",
            "merge the file into its base with `diffsynth merge-lora --base`",
        )
    known = ", ".join(facts.title for facts in families)
    none = f"none of its {len(keys)} keys matches a" if len(keys) > 1 else "its only key matches no"
    return DiffSynthError(
        f"`{weights.origin}`: {none} module of {known}: {list_names(keys)}",
        "pass a LoRA for one of them" if any(map(is_lora_key, keys)) else "pass a LoRA file",
    )


def _unmatched(weights: WeightSet, reading: LoraReading) -> DiffSynthError:
    unmatched = sorted(reading.match.unmatched)
    message = (
        f"`{weights.origin}`: {len(unmatched)} of {pluralize(len(weights.tensors), 'key')} "
        f"{verb(len(unmatched), 'matches', 'match')} no module of {reading.title}: {list_names(unmatched)}"
    )
    differences = [key for key in unmatched if is_difference_key(key)]
    if len(differences) == len(unmatched):
        return DiffSynthError(
            f"`{weights.origin}` contains {pluralize(len(differences), 'full-weight difference')} besides the LoRA of "
            f"{reading.title}, which no LoRA format can store: {list_names(differences)}",
            "merge the file into its base with `diffsynth merge-lora --base`, or skip them with `--allow_unmatched`",
        )
    if not any(map(is_lora_key, unmatched)):
        return DiffSynthError(message, "split the file with `diffsynth split-ckpt`, and convert its LoRA")
    encoder = sum(key.startswith(TEXT_ENCODER_PREFIXES) for key in unmatched)
    of_encoder = f" ({encoder} of them for a text encoder)" if encoder else ""
    return DiffSynthError(message + of_encoder, "skip them with `--allow_unmatched`, or pass another file")


def _read(weights: WeightSet, reading: LoraReading) -> Lora:
    """The LoRA of a file, if all its values are finite."""
    (path,) = weights.files
    lora = read_matched_lora(path, read_header(path), reading.match)
    not_finite = [
        key
        for key, tensor in weights.tensors.items()
        if key not in reading.match.unmatched and not all_finite(weights.spans[key], tensor.dtype)
    ]
    if not_finite:
        raise DiffSynthError(
            f"`{weights.origin}`: {pluralize(len(not_finite), 'tensor')} with NaN or Inf: {list_names(not_finite)}",
            "use an earlier checkpoint",
        )
    return lora

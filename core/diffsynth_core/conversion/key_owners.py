"""Ownership of checkpoint keys: the component of each, from its prefix, from the run's record, or from names.

No torch.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from diffsynth_core.checkpoints.keys import split_key, strip_controlnet_index
from diffsynth_core.checkpoints.run_folder import RunRecord, read_record
from diffsynth_core.errors import DiffSynthError, FaultsFound, Problem, list_names
from diffsynth_core.models.recognition import SECOND_NAMES, components_that_fit, facts_of, layout_of
from diffsynth_core.models.registry import FAMILIES, unknown_family
from diffsynth_core.models.spec import FamilyFacts
from diffsynth_core.progress import pluralize, verb
from diffsynth_core.weights.lora_formats import TRANSFORMER_PREFIXES
from diffsynth_core.weights.lora_keys import is_lora_key
from diffsynth_core.weights.weight_sets import WeightSet

VAE_PARTS = ("vae_encoder", "vae_decoder")
"""Public names of FLUX.1's VAE, which DiffSynth-Studio has as two components."""


def component_names() -> frozenset[str]:
    """Return all component names."""
    of_families = (name for facts in FAMILIES.values() for name in facts.component_names)
    return frozenset(chain(SECOND_NAMES, VAE_PARTS, of_families))


@dataclass(frozen=True)
class Origin:
    """What is known about a checkpoint besides its keys.

    Attributes:
        removed_prefix: prefix that was removed from its keys; None: unknown.
        lora_component: component with the LoRA.
        default_component: component of keys without a prefix, set by the user.
    """

    family: FamilyFacts | None = None
    removed_prefix: str | None = None
    lora_component: str | None = None
    default_component: str | None = None


def read_origin(weights: WeightSet, family: str | None = None, default_component: str | None = None) -> Origin:
    """Return what a checkpoint's metadata, the run.json next to it and the user state about it.

    Raises:
        FaultsFound: if they contradict each other, or name an unknown family or component.
    """
    if family is not None and family not in FAMILIES:
        raise FaultsFound([unknown_family(family)])
    if default_component is not None and default_component not in component_names():
        known = ", ".join(sorted(component_names()))
        raise FaultsFound([Problem(f"unknown component `{default_component}`", f"known: {known}", wrong_use=True)])
    record = None if weights.metadata_value("removed_prefix") is not None else record_of(weights)
    parameters = record.parameters if record else {}
    recorded = weights.metadata_value("family") or (record.family if record else None)
    if recorded in FAMILIES and family not in (None, recorded):
        raise DiffSynthError(
            f"`{weights.origin}` is recorded as family `{recorded}`, but `--family` is `{family}`", "remove `--family`"
        )
    removed = weights.metadata_value("removed_prefix")
    if removed is None and record:
        removed = strip_controlnet_index(str(parameters.get("remove_prefix_in_ckpt") or ""))
    known_family = family if family is not None else recorded
    return Origin(
        FAMILIES.get(known_family) if known_family else None,
        removed,
        weights.metadata_value("lora_component") or parameters.get("lora_base_model"),
        default_component,
    )


def record_of(weights: WeightSet) -> RunRecord | None:
    """Return the record of the run that wrote a checkpoint, if it is in the same folder and lists it."""
    folder = weights.files[0].parent
    try:
        record = read_record(folder)
    except DiffSynthError as error:
        raise DiffSynthError(str(error), "move it away, and pass `--unprefixed` if it is asked for") from error
    written = {saved.file for entry in record.checkpoints for saved in entry.files} if record else set()
    return record if written & {path.name for path in weights.files} else None


@dataclass(frozen=True)
class KeyOwners:
    """The keys of a checkpoint by component.

    Attributes:
        components: component -> name -> key; full weights and LoRA separately.
        unmatched: keys without a component.
        fits: components that the unmatched keys could belong to.
    """

    full: Mapping[str, Mapping[str, str]]
    lora: Mapping[str, Mapping[str, str]]
    unmatched: tuple[str, ...] = ()
    fits: tuple[str, ...] = ()


def find_owners(keys: Iterable[str], origin: Origin) -> KeyOwners:
    """Group the keys of a checkpoint by component.

    Raises:
        DiffSynthError: if two keys denote the same tensor, or `--unprefixed` contradicts the checkpoint.
    """
    owned: dict[tuple[str, str], list[str]] = {}
    bare: list[str] = []
    for key in keys:
        owner = _owner_of(key, origin)
        if owner is None:
            bare.append(key)
        else:
            owned.setdefault(owner, []).append(key)
    fits: tuple[str, ...] = ()
    if bare:
        prefixed = {component for component, _ in owned}
        fits = (
            (origin.default_component,)
            if origin.default_component
            else components_that_fit(bare, origin.family, prefixed)
        )
        if len(fits) == 1:
            for key in bare:
                owned.setdefault((fits[0], key), []).append(key)
            bare = []
    twice = [keys for keys in owned.values() if len(keys) > 1]
    if twice:
        raise DiffSynthError(
            f"{pluralize(len(twice), 'duplicate tensor')}: {list_names(list(chain(*twice)))}",
            "pass a file that has each tensor once",
        )
    full: dict[str, dict[str, str]] = {}
    lora: dict[str, dict[str, str]] = {}
    for (component, name), (key,) in owned.items():
        (lora if is_lora_key(name) else full).setdefault(component, {})[name] = key
    return KeyOwners(full, lora, tuple(bare), fits)


def _owner_of(key: str, origin: Origin) -> tuple[str, str] | None:
    """(component, name in it) of a key, as its prefix or the run says; None where neither does."""
    whole = split_key(key)
    if whole:
        return whole
    head, _, rest = key.partition(".")
    if rest and head in component_names():
        return head, rest
    if key.startswith(TRANSFORMER_PREFIXES) and is_lora_key(key):
        return origin.lora_component or "dit", key
    whole = split_key(origin.removed_prefix + key) if origin.removed_prefix else None
    if whole and origin.default_component not in (None, whole[0]):
        raise DiffSynthError(
            f"the checkpoint assigns keys without a prefix to `{whole[0]}`, but `--unprefixed` is `{origin.default_component}`",
            "remove `--unprefixed`",
        )
    return whole


def misnamed(full: Mapping[str, Collection[str]], family: FamilyFacts | None) -> list[Problem]:
    """Return problems of components whose tensors have the names of another component of the family."""
    problems = []
    for component, names in full.items():
        own = facts_of(component, family)
        if family is None or own is None or layout_of(own, names):
            continue
        other = next((known.name for known in family.components if layout_of(known, names)), None)
        if other:
            problems.append(Problem(f"the tensors under `{component}` belong to `{other}`: {list_names(list(names))}"))
    return problems


def unmatched_problem(origin: str, owners: KeyOwners, total: int) -> Problem:
    """Return the problem of keys without a component."""
    fits = f"; their names match {list_names(owners.fits)}" if owners.fits else "; they match no known component"
    return Problem(
        f"`{origin}`: {len(owners.unmatched)} of {pluralize(total, 'key')} "
        f"{verb(len(owners.unmatched), 'has', 'have')} no component prefix: {list_names(owners.unmatched)}{fits}",
        "assign them with `--unprefixed`, or skip them with `--allow_unmatched`",
    )

"""Ownership of checkpoint keys: the component of each, from its prefix, from the run's record, or from names.

No torch.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from diffsynth_core.checkpoints.keys import split_key, strip_controlnet_index
from diffsynth_core.checkpoints.run_folder import RunRecord, read_record
from diffsynth_core.errors import DiffSynthError, FaultsFound, Problem, list_names
from diffsynth_core.models.registry import FAMILIES, find_unsupported, unknown_family
from diffsynth_core.models.spec import ComponentFacts, FamilyFacts, Layout
from diffsynth_core.progress import pluralize
from diffsynth_core.weights.key_maps import KeyMap
from diffsynth_core.weights.lora_formats import TRANSFORMER_PREFIXES
from diffsynth_core.weights.lora_keys import is_lora_key, module_of_lora_key
from diffsynth_core.weights.weight_sets import WeightSet

SECOND_NAMES = {"dit2": "dit"}
"""Component -> component of the same kind whose facts apply."""
HALVES = ("vae_encoder", "vae_decoder")
"""Documented names of FLUX.1's VAE, whose encoder and decoder are separate components in DiffSynth-Studio."""
COMPONENTS = frozenset(
    chain(SECOND_NAMES, HALVES, (name for facts in FAMILIES.values() for name in facts.component_names))
)
"""All component names."""


@dataclass(frozen=True)
class Origin:
    """What is known about a checkpoint besides its keys.

    Attributes:
        removed_prefix: prefix that was removed from its keys; None: unknown.
        lora_component: component with the LoRA.
        unprefixed: component of keys without a prefix, set by the user.
    """

    family: FamilyFacts | None = None
    removed_prefix: str | None = None
    lora_component: str | None = None
    unprefixed: str | None = None


def read_origin(weights: WeightSet, family: str | None = None, unprefixed: str | None = None) -> Origin:
    """Return what a checkpoint's metadata, the run.json next to it and the user state about it.

    Raises:
        FaultsFound: if they contradict each other, or name an unknown family or component.
    """
    if family is not None and family not in FAMILIES:
        raise FaultsFound([unknown_family(family)])
    if unprefixed is not None and unprefixed not in COMPONENTS:
        known = ", ".join(sorted(COMPONENTS))
        raise FaultsFound([Problem(f"unknown component `{unprefixed}`", f"known: {known}", wrong_use=True)])
    record = None if weights.metadata_value("removed_prefix") is not None else _record_of(weights)
    parameters = record.parameters if record else {}
    told = weights.metadata_value("family") or (record.family if record else None)
    if told in FAMILIES and family not in (None, told):
        raise DiffSynthError(
            f"`{weights.origin}` is recorded as family `{told}`, but `--family` is `{family}`", "remove `--family`"
        )
    removed = weights.metadata_value("removed_prefix")
    if removed is None and record:
        removed = strip_controlnet_index(str(parameters.get("remove_prefix_in_ckpt") or ""))
    known_family = family if family is not None else told
    return Origin(
        FAMILIES.get(known_family) if known_family else None,
        removed,
        weights.metadata_value("lora_component") or parameters.get("lora_base_model"),
        unprefixed,
    )


def _record_of(weights: WeightSet) -> RunRecord | None:
    """Return the record of the run that wrote a checkpoint, if it is in the same folder and lists it."""
    folder = weights.files[0].parent
    try:
        record = read_record(folder)
    except DiffSynthError as error:
        raise DiffSynthError(str(error), "move it away, and pass `--unprefixed` if it is asked for") from error
    written = {entry.file for entry in record.checkpoints} if record else set()
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
        owner = _told(key, origin)
        if owner is None:
            bare.append(key)
        else:
            owned.setdefault(owner, []).append(key)
    fits: tuple[str, ...] = ()
    if bare:
        prefixed = {component for component, _ in owned}
        fits = (origin.unprefixed,) if origin.unprefixed else components_that_fit(bare, origin.family, prefixed)
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


def _told(key: str, origin: Origin) -> tuple[str, str] | None:
    """(component, name in it) of a key, as its prefix or the run says; None where neither does."""
    whole = split_key(key)
    if whole:
        return whole
    head, _, rest = key.partition(".")
    if head in COMPONENTS and rest:
        return head, rest
    if key.startswith(TRANSFORMER_PREFIXES) and is_lora_key(key):
        return origin.lora_component or "dit", key
    whole = split_key(origin.removed_prefix + key) if origin.removed_prefix else None
    if whole and origin.unprefixed not in (None, whole[0]):
        raise DiffSynthError(
            f"the checkpoint assigns keys without a prefix to `{whole[0]}`, but `--unprefixed` is `{origin.unprefixed}`",
            "remove `--unprefixed`",
        )
    return whole


def components_that_fit(
    keys: Collection[str], family: FamilyFacts | None = None, taken: Collection[str] = ()
) -> tuple[str, ...]:
    """Return the components, of one family or of all, that have tensors with all these names, except for those in
    `taken`.

    If a component's signature is among the names, that decides; otherwise its key maps do, as far as they are
    complete.
    """
    full = [key for key in keys if not is_lora_key(key)]
    modules = {f"{module_of_lora_key(key)}.weight" for key in keys if is_lora_key(key)}
    found: dict[str, None] = {}
    for facts in [family] if family else FAMILIES.values():
        if find_unsupported(full, facts):
            continue
        candidates = [component for component in facts.components if component.name not in taken]
        signed = [component for component in candidates if layout_of(component, full)]
        for component in signed or candidates:
            if all(_knows(component, name) for name in (*(() if signed else full), *modules)):
                found[component.name] = None
    return tuple(found)


def layout_of(component: ComponentFacts, names: Collection[str]) -> Layout | None:
    """Return the layout of a component's files whose signature is among tensor names, excluding borrowed layouts."""
    present = frozenset(names)
    own = (layout for layout in component.layouts if not layout.borrowed)
    return next((layout for layout in own if layout.signature <= present), None)


def _knows(component: ComponentFacts, name: str) -> bool:
    """Return whether a component has a tensor of this name in one of its layouts, as far as is known."""
    return any(has_place(names, layout, name) for names, layout in readings(component))


def readings(component: ComponentFacts) -> list[tuple[KeyMap, Layout]]:
    """Return the key maps from names in checkpoints to module keys that may apply to a component, with their layouts.

    Maps that list all tensors come first; of the others those of files, which may read old and new names.
    """
    found = [
        (names, layout)
        for layout in component.layouts
        for names in (layout.names, layout.public_keys, layout.checkpoint_keys)
    ]
    return sorted(found, key=lambda pair: not is_strict(pair[0]))


def has_place(names: KeyMap, layout: Layout, name: str) -> bool:
    """Return whether a map has a target for a tensor, or ignores it on purpose.

    For a map that accepts any name the documented names decide; if they accept any too, its first part decides.
    """
    if is_strict(names):
        return names.to_targets(name) is not None
    if is_strict(layout.public_keys):
        return any(layout.public_keys.to_source(own) is not None for own in layout.names.to_targets(name) or ())
    return _top(name) in {_top(signed) for signed in layout.signature}


def _top(name: str) -> str:
    return name.partition(".")[0]


def is_strict(names: KeyMap) -> bool:
    """Return whether a map lists all tensors."""
    return names.to_targets("no such tensor") is None


def kind_of(component: str) -> str:
    """Return the component whose facts apply to `component`."""
    return SECOND_NAMES.get(component, component)


def facts_of(component: str, family: FamilyFacts | None) -> ComponentFacts | None:
    """Return a family's facts about a component, if it has it."""
    named = family.components if family else ()
    return next((facts for facts in named if facts.name == kind_of(component)), None)


def find_family(full: Mapping[str, Collection[str]]) -> FamilyFacts | None:
    """Return the only family whose components have all these names; None if there are none or several."""
    fitting = [
        facts
        for facts in FAMILIES.values()
        if full and all(_is_named(facts_of(component, facts), names, facts) for component, names in full.items())
    ]
    return fitting[0] if len(fitting) == 1 else None


def _is_named(component: ComponentFacts | None, names: Collection[str], facts: FamilyFacts) -> bool:
    return component is not None and not find_unsupported(names, facts) and layout_of(component, names) is not None


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
        f"`{origin}`: {len(owners.unmatched)} of {total} keys have no component prefix: "
        f"{list_names(owners.unmatched)}{fits}",
        "assign them with `--unprefixed`, or skip them with `--allow_unmatched`",
    )

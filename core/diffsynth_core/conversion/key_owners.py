"""Which component each key of a checkpoint belongs to: told by its prefix, by what the run wrote down, or by names.

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
"""Components that are another of the same kind."""
HALVES = ("vae_encoder", "vae_decoder")
"""Documented names of FLUX.1's VAE, whose halves are components of the reference trainer."""
COMPONENTS = frozenset(
    chain(SECOND_NAMES, HALVES, (name for facts in FAMILIES.values() for name in facts.component_names))
)


@dataclass(frozen=True)
class Origin:
    """What is known of a checkpoint beside its keys.

    `removed_prefix`: what was taken off its keys; None: not told. `lora_component`: the component with the LoRA.
    `unprefixed`: whose keys without a prefix are, as the user says.
    """

    family: FamilyFacts | None = None
    removed_prefix: str | None = None
    lora_component: str | None = None
    unprefixed: str | None = None


def read_origin(weights: WeightSet, family: str | None = None, unprefixed: str | None = None) -> Origin:
    """What the metadata of a checkpoint say of it, else the run.json beside it, and the user.

    Raises:
        FaultsFound: when they contradict each other, or there is no such family or component.
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
    """The record of the run that wrote a checkpoint, if it lies beside it and says so."""
    folder = weights.files[0].parent
    try:
        record = read_record(folder)
    except DiffSynthError as error:
        raise DiffSynthError(str(error), "move it away, and pass `--unprefixed` if it is asked for") from error
    written = {entry.file for entry in record.checkpoints} if record else set()
    return record if written & {path.name for path in weights.files} else None


@dataclass(frozen=True)
class KeyOwners:
    """The keys of a checkpoint by component: `components` has, for each, its names -> keys; full weights and LoRA
    apart. `unmatched`: keys that belong to none, `fits` the components that they could be of."""

    full: Mapping[str, Mapping[str, str]]
    lora: Mapping[str, Mapping[str, str]]
    unmatched: tuple[str, ...] = ()
    fits: tuple[str, ...] = ()


def find_owners(keys: Iterable[str], origin: Origin) -> KeyOwners:
    """Group the keys of a checkpoint by component.

    Raises:
        DiffSynthError: when two keys say the same tensor, or `--unprefixed` contradicts what the checkpoint says.
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
    """The components, of one family or of all, that have tensors of all these names; those in `taken` left out.

    A component's signature decides where it is there; else the names alone do, as far as tables know them.
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
    """The layout of a component's files whose signature is among tensor names; none that is borrowed."""
    present = frozenset(names)
    own = (layout for layout in component.layouts if not layout.borrowed)
    return next((layout for layout in own if layout.signature <= present), None)


def _knows(component: ComponentFacts, name: str) -> bool:
    """Whether a component has a tensor of a name in one of its layouts, as far as can be told."""
    return any(has_place(names, layout, name) for names, layout in readings(component))


def readings(component: ComponentFacts) -> list[tuple[KeyMap, Layout]]:
    """The names that checkpoints may hold a component in -> those in our module, with the layout that they are of.

    Maps that know which tensors there are come first; of others those of files, which may read names old and new.
    """
    found = [
        (names, layout)
        for layout in component.layouts
        for names in (layout.names, layout.public_keys, layout.checkpoint_keys)
    ]
    return sorted(found, key=lambda pair: not is_strict(pair[0]))


def has_place(names: KeyMap, layout: Layout, name: str) -> bool:
    """Whether a map has a place for a tensor, or knows that none is needed.

    Of one that takes any name the table of the documented ones tells, and where that takes any too, how it begins.
    """
    if is_strict(names):
        return names.to_targets(name) is not None
    if is_strict(layout.public_keys):
        return any(layout.public_keys.to_source(own) is not None for own in layout.names.to_targets(name) or ())
    return _top(name) in {_top(signed) for signed in layout.signature}


def _top(name: str) -> str:
    return name.partition(".")[0]


def is_strict(names: KeyMap) -> bool:
    """Whether a map knows which tensors there are."""
    return names.to_targets("no such tensor") is None


def kind_of(component: str) -> str:
    """The component that a family states facts about, given one that is another of its kind."""
    return SECOND_NAMES.get(component, component)


def facts_of(component: str, family: FamilyFacts | None) -> ComponentFacts | None:
    """What a family states about a component, if it has it."""
    named = family.components if family else ()
    return next((facts for facts in named if facts.name == kind_of(component)), None)


def find_family(full: Mapping[str, Collection[str]]) -> FamilyFacts | None:
    """The one family all of whose components, as far as they are there, have these names; None: none, or several."""
    fitting = [
        facts
        for facts in FAMILIES.values()
        if full and all(_is_named(facts_of(component, facts), names, facts) for component, names in full.items())
    ]
    return fitting[0] if len(fitting) == 1 else None


def _is_named(component: ComponentFacts | None, names: Collection[str], facts: FamilyFacts) -> bool:
    return component is not None and not find_unsupported(names, facts) and layout_of(component, names) is not None


def misnamed(full: Mapping[str, Collection[str]], family: FamilyFacts | None) -> list[Problem]:
    """Components whose tensors have the names of another component of their family."""
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
    """The problem that keys belong to no component."""
    fits = f"; their names match {list_names(owners.fits)}" if owners.fits else "; they match no known component"
    return Problem(
        f"`{origin}`: {len(owners.unmatched)} of {total} keys have no component prefix: "
        f"{list_names(owners.unmatched)}{fits}",
        "assign them with `--unprefixed`, or skip them with `--allow_unmatched`",
    )

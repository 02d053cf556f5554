"""Which family and component weights belong to, by the names of their repository, their files or their tensors.

No torch.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch

from diffsynth_core.models.registry import FAMILIES
from diffsynth_core.models.spec import ComponentFacts, FamilyFacts, Layout, UnsupportedCheckpoint
from diffsynth_core.weights.headers import TensorHeader
from diffsynth_core.weights.key_maps import KeyMap
from diffsynth_core.weights.lora_formats import LoraKeys, LoraNaming
from diffsynth_core.weights.lora_keys import (
    LoraMatch,
    is_lora_key,
    match_in_vocabulary,
    match_lora_keys,
    module_of_lora_key,
)

Recognized = tuple[FamilyFacts, ComponentFacts, Layout]
"""Family, component and layout of tensor names."""
SECOND_NAMES = {"dit2": "dit"}
"""Component -> component of the same kind whose facts apply."""
_NUMBER = re.compile(r"\d+")

# By the names of repositories and files


def family_of_model(model_id: str) -> FamilyFacts | None:
    """Return the family of a hub repository, by its name."""
    return next(
        (facts for facts in FAMILIES.values() if any(fnmatch(model_id, name) for name in facts.model_ids)), None
    )


def not_trained(entry: str) -> str | None:
    """Return the unsupported model that an entry of `model_id_with_origin_paths` belongs to, if known."""
    known = (item for facts in FAMILIES.values() for item in facts.not_trained.items())
    return next((what for pattern, what in known if fnmatch(entry, pattern)), None)


def component_at(path: str, facts: FamilyFacts, model_id: str = "") -> ComponentFacts | None:
    """Return the component of a path in a recipe, such as `transformer/diffusion_pytorch_model*.safetensors`.

    For a path that fits several, such as `diffusion_pytorch_model.safetensors`, the repository's name may decide.
    """
    named = [(component, pattern) for component in facts.components for pattern in component.file_patterns]
    return next(
        (component for component, pattern in named if ":" in pattern and fnmatch(f"{model_id}:{path}", pattern)),
        next((component for component, pattern in named if fnmatch(path, pattern)), None),
    )


# By the names of tensors


def recognize(names: Collection[str], facts: FamilyFacts) -> tuple[ComponentFacts, Layout] | None:
    """Return the component and layout whose signature is in the tensor names."""
    present = frozenset(names)
    if find_unsupported(present, facts):
        return None
    return next(
        (
            (component, layout)
            for component in facts.components
            for layout in component.layouts
            if layout.signature <= present
        ),
        None,
    )


def find_unsupported(names: Collection[str], facts: FamilyFacts) -> UnsupportedCheckpoint | None:
    """Return the known unsupported checkpoint that looks like a component but has these tensor names."""
    return next((known for known in facts.lookalikes if known.signature <= frozenset(names)), None)


def recognize_family(names: Collection[str]) -> FamilyFacts | None:
    """Return the family whose diffusion transformer has these tensor names."""
    for facts in FAMILIES.values():
        found = recognize(names, facts)
        if found and found[0].name == facts.denoiser:
            return facts
    return None


def recognize_component(names: Collection[str], family: FamilyFacts | None = None) -> Recognized | None:
    """Return the family, component and layout of these tensor names; a diffusion transformer takes precedence."""
    families = [family] if family else FAMILIES.values()
    found = [(facts, *known) for facts in families if (known := recognize(names, facts))]
    found.sort(key=lambda item: item[2].borrowed)
    denoisers = [item for item in found if item[1].name == item[0].denoiser]
    return next(iter(denoisers or found), None)


def family_of_files(names: Sequence[Collection[str]], model_ids: Sequence[str | None]) -> FamilyFacts | None:
    """Return the family of the files of one run.

    It is the family of the diffusion transformer; without one that of the repositories, or the only one that has a
    component for each file.

    Args:
        names: the tensor names of each file.
        model_ids: its hub repository, if known.
    """
    for family in (*map(recognize_family, names), *map(family_of_model, filter(None, model_ids))):
        if family:
            return family
    fitting = [facts for facts in FAMILIES.values() if all(recognize(own, facts) for own in names)]
    return fitting[0] if len(fitting) == 1 else None


def facts_of(component: str, family: FamilyFacts | None) -> ComponentFacts | None:
    """Return what a family states about a component, or about the one of the same kind; None if it has none."""
    named = family.components if family else ()
    return next((facts for facts in named if facts.name == SECOND_NAMES.get(component, component)), None)


def family_of_components(full: Mapping[str, Collection[str]]) -> FamilyFacts | None:
    """Return the only family whose components, as far as they are given, have these tensor names."""
    fitting = [
        facts
        for facts in FAMILIES.values()
        if full and all(_has_layout(component, names, facts) for component, names in full.items())
    ]
    return fitting[0] if len(fitting) == 1 else None


def _has_layout(component: str, names: Collection[str], family: FamilyFacts) -> bool:
    facts = facts_of(component, family)
    return facts is not None and not find_unsupported(names, family) and layout_of(facts, names) is not None


# By some of the tensors of a component


def components_that_fit(
    keys: Collection[str], family: FamilyFacts | None = None, taken: Collection[str] = ()
) -> tuple[str, ...]:
    """Return the components, of one family or of all, that have tensors of all these names, except those in `taken`.

    A signature among the names decides; without one the names do, as far as key maps know them.
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
    """Return the layout of a component whose signature is in the tensor names, unless it is borrowed."""
    present = frozenset(names)
    own = (layout for layout in component.layouts if not layout.borrowed)
    return next((layout for layout in own if layout.signature <= present), None)


def _knows(component: ComponentFacts, name: str) -> bool:
    """Whether a component has a tensor of a name in one of its layouts, as far as is known."""
    return any(has_place(names, layout, name) for names, layout in readings(component))


def readings(component: ComponentFacts) -> list[tuple[KeyMap, Layout]]:
    """Return the key maps of the names that checkpoints may have for a component, with their layout.

    Maps that know all tensors come first; among others those of files, which may read old and new names.
    """
    found = [
        (names, layout)
        for layout in component.layouts
        for names in (layout.names, layout.public_keys, layout.checkpoint_keys)
    ]
    return sorted(found, key=lambda pair: not is_strict(pair[0]))


def has_place(names: KeyMap, layout: Layout, name: str) -> bool:
    """Whether a key map knows a tensor, or ignores it on purpose.

    For one that takes any name, the map of public names decides, and if that takes any name too, the top-level module.
    """
    if is_strict(names):
        return names.to_targets(name) is not None
    if is_strict(layout.public_keys):
        return any(layout.public_keys.to_source(own) is not None for own in layout.names.to_targets(name) or ())
    return _top(name) in {_top(signed) for signed in layout.signature}


def _top(name: str) -> str:
    return name.partition(".")[0]


def is_strict(names: KeyMap) -> bool:
    """Whether a key map knows all tensors, so that other names are unknown."""
    return names.to_targets("no such tensor") is None


# By the keys of a LoRA


@dataclass(frozen=True)
class LoraReading:
    """The keys of a LoRA file, matched to the modules of one component of one family."""

    facts: FamilyFacts
    naming: LoraNaming
    match: LoraMatch

    @property
    def title(self) -> str:
        """The component, as messages name it."""
        return f"the {self.facts.title} {self.naming.component}"


def read_lora_keys(keys: Collection[str], families: Sequence[FamilyFacts], component: str | None) -> list[LoraReading]:
    """Match the keys of a LoRA file to a component of each family that has it, by default to the denoiser.

    A second denoiser has the module names of the first; formats have no names for other components.
    """
    found = []
    for facts in families:
        naming = facts.component(facts.denoiser).lora_naming
        if component not in (None, facts.denoiser, facts.second_denoiser):
            continue
        if component is not None:
            naming = replace(naming, component=component)
        found.append(LoraReading(facts, naming, match_lora_keys(keys, naming.modules_met(keys), naming)))
    return found


def best_readings(readings: Sequence[LoraReading], tensors: Mapping[str, TensorHeader]) -> list[LoraReading]:
    """Return the readings that explain most keys; of several, those that no weight or block number rules out."""
    fewest = min(len(reading.match.unmatched) for reading in readings)
    best = [reading for reading in readings if len(reading.match.unmatched) == fewest]
    return [reading for reading in best if not _is_ruled_out(reading, tensors)] or best


def lora_vocabularies(keys: Collection[str]) -> frozenset[tuple[str, str]]:
    """Return (family, vocabulary) of all that have a module of the denoiser for each key of a LoRA file."""
    namings = {name: facts.component(facts.denoiser).lora_naming for name, facts in FAMILIES.items()}
    return frozenset(
        (family, vocabulary.title)
        for family, naming in namings.items()
        for vocabulary in naming.vocabularies
        if not match_in_vocabulary(keys, naming.modules_met(keys), vocabulary, naming).unmatched
    )


def _is_ruled_out(reading: LoraReading, tensors: Mapping[str, TensorHeader]) -> bool:
    """Whether the family has no weight of such shapes, or no such block."""
    return any(
        _is_beyond_the_last_block(whole, reading.facts.component(reading.facts.denoiser))
        for name in reading.match.loras
        for whole in reading.match.vocabulary.public(name)
    ) or any(_has_other_sides(name, keys, reading, tensors) for name, keys in reading.match.loras.items())


def _is_beyond_the_last_block(module: str, component: ComponentFacts) -> bool:
    """Whether a public module is in a block that no published model has."""
    for start, count in component.max_blocks.items():
        number = module.removeprefix(start).partition(".")[0]
        if module.startswith(start) and number.isdigit() and int(number) >= count:
            return True
    return False


def _has_other_sides(name: str, keys: LoraKeys, reading: LoraReading, tensors: Mapping[str, TensorHeader]) -> bool:
    """Whether rows and columns of a weight have another ratio than in the family; False if it is not known.

    It is not known for parts of a module, nor for several modules fused into one.
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

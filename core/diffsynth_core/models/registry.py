"""The families there are, in one table."""

from collections.abc import Collection
from fnmatch import fnmatch
from importlib import import_module
from typing import TYPE_CHECKING

from diffsynth_core.errors import Problem, suggest
from diffsynth_core.models.flux.spec import FLUX
from diffsynth_core.models.flux2.spec import FLUX2
from diffsynth_core.models.qwen_image.spec import QWEN_IMAGE
from diffsynth_core.models.spec import ComponentFacts, FamilyFacts, Layout, UnsupportedCheckpoint
from diffsynth_core.models.wan.spec import WAN

if TYPE_CHECKING:
    from diffsynth_core.models.family import Family

FAMILIES: dict[str, FamilyFacts] = {facts.name: facts for facts in (QWEN_IMAGE, WAN, FLUX, FLUX2)}

_IMPLEMENTATIONS = {
    "qwen-image": ("diffsynth_core.models.qwen_image.family", "QwenImage"),
    "wan": ("diffsynth_core.models.wan.family", "Wan"),
    "flux": ("diffsynth_core.models.flux.family", "Flux"),
    "flux2": ("diffsynth_core.models.flux2.family", "Flux2"),
}


REFERENCE_COLUMNS = tuple(dict.fromkeys(name for facts in FAMILIES.values() for name in facts.reference_columns))
"""Metadata columns of reference images, of whatever family."""
FRAME_INPUTS = tuple(dict.fromkeys(name for facts in FAMILIES.values() for name in facts.frame_inputs))
LATER_INPUTS = tuple(dict.fromkeys(name for facts in FAMILIES.values() for name in facts.later_inputs))
"""Extra inputs of the reference trainer that are not supported yet."""


def unknown_family(name: str) -> Problem:
    """The problem that there is no such family, with the nearest name."""
    near = suggest(name, FAMILIES)
    hint = f"did you mean `{near}`?" if near else f"known: {', '.join(FAMILIES)}"
    return Problem(f"unknown family `{name}`", hint, wrong_use=True)


def load_family(name: str) -> "Family":
    """The family's verbs; imports torch and the model libraries."""
    module_name, class_name = _IMPLEMENTATIONS[name]
    family: Family = getattr(import_module(module_name), class_name)()
    return family


def unread_note(facts: FamilyFacts, dialect: str, option: str) -> str | None:
    """What to know of a LoRA of the denoiser in a dialect that no other program reads; None where one does.

    `option`: the one that names the dialect.
    """
    if dialect not in facts.component(facts.denoiser).unread:
        return None
    return (
        f"only `diffsynth` loads a LoRA of {facts.title} in the format `{dialect}`; most programs load `{option} kohya`"
    )


def family_of_model(model_id: str) -> FamilyFacts | None:
    """The family whose models a hub repository holds, told by its name."""
    return next(
        (facts for facts in FAMILIES.values() if any(fnmatch(model_id, name) for name in facts.model_ids)), None
    )


def not_trained(entry: str) -> str | None:
    """What an entry of `model_id_with_origin_paths` belongs to, if that is known and not trained here."""
    known = (item for facts in FAMILIES.values() for item in facts.not_trained.items())
    return next((what for pattern, what in known if fnmatch(entry, pattern)), None)


def recognise(names: Collection[str], facts: FamilyFacts) -> tuple[ComponentFacts, Layout] | None:
    """The component of a family, and the layout of its files, whose signature is among tensor names."""
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
    """What is known of files with these tensor names that are no component of a family, though they look like one."""
    return next((known for known in facts.lookalikes if known.signature <= frozenset(names)), None)


def component_at(place: str, facts: FamilyFacts, model_id: str = "") -> ComponentFacts | None:
    """The component whose files a recipe names so, such as `transformer/diffusion_pytorch_model*.safetensors`.

    Where the place tells nothing, such as `diffusion_pytorch_model.safetensors`, the repository's name may.
    """
    named = [(component, pattern) for component in facts.components for pattern in component.file_patterns]
    return next(
        (component for component, pattern in named if ":" in pattern and fnmatch(f"{model_id}:{place}", pattern)),
        next((component for component, pattern in named if fnmatch(place, pattern)), None),
    )


def recognise_family(names: Collection[str]) -> FamilyFacts | None:
    """The family whose diffusion transformer has these tensor names."""
    for facts in FAMILIES.values():
        found = recognise(names, facts)
        if found and found[0].name == facts.denoiser:
            return facts
    return None

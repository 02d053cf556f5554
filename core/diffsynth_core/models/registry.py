"""Table of the families."""

from collections.abc import Collection
from fnmatch import fnmatch
from importlib import import_module
from typing import TYPE_CHECKING

from diffsynth_core.config.choices import LoraFormat
from diffsynth_core.errors import Problem, suggest
from diffsynth_core.models.flux.spec import FLUX
from diffsynth_core.models.flux2.spec import FLUX2
from diffsynth_core.models.qwen_image.spec import QWEN_IMAGE
from diffsynth_core.models.spec import ComponentFacts, FamilyFacts, Layout, UnsupportedCheckpoint
from diffsynth_core.models.wan.spec import WAN

if TYPE_CHECKING:
    from diffsynth_core.models.family import Family

FAMILIES: dict[str, FamilyFacts] = {facts.name: facts for facts in (QWEN_IMAGE, WAN, FLUX, FLUX2)}
"""Name -> facts."""

_IMPLEMENTATIONS = {
    "qwen-image": ("diffsynth_core.models.qwen_image.family", "QwenImage"),
    "wan": ("diffsynth_core.models.wan.family", "Wan"),
    "flux": ("diffsynth_core.models.flux.family", "Flux"),
    "flux2": ("diffsynth_core.models.flux2.family", "Flux2"),
}


REFERENCE_COLUMNS = tuple(dict.fromkeys(name for facts in FAMILIES.values() for name in facts.reference_columns))
"""Metadata columns of reference images, of all families."""
FRAME_INPUTS = tuple(dict.fromkeys(name for facts in FAMILIES.values() for name in facts.frame_inputs))
"""Extra inputs that are frames of the target clip, of all families."""
LATER_INPUTS = tuple(dict.fromkeys(name for facts in FAMILIES.values() for name in facts.later_inputs))
"""Extra inputs of DiffSynth-Studio that are not supported yet."""


def unknown_family(name: str) -> Problem:
    """Return the problem of an unknown family, with the closest name as the hint."""
    near = suggest(name, FAMILIES)
    hint = f"did you mean `{near}`?" if near else f"known: {', '.join(FAMILIES)}"
    return Problem(f"unknown family `{name}`", hint, wrong_use=True)


def load_family(name: str) -> "Family":
    """Return the implementation of a family; imports torch and the model libraries."""
    module_name, class_name = _IMPLEMENTATIONS[name]
    family: Family = getattr(import_module(module_name), class_name)()
    return family


def unread_note(facts: FamilyFacts, lora_format: LoraFormat, option: str) -> str | None:
    """Return a note about a LoRA of the denoiser in a format that no other program reads; None if one does.

    Args:
        option: the option that selects the format.
    """
    if lora_format not in facts.component(facts.denoiser).unread_formats:
        return None
    return f"only `diffsynth` loads a LoRA of {facts.title} in the format `{lora_format}`; most programs load `{option} kohya`"


def family_of_model(model_id: str) -> FamilyFacts | None:
    """Return the family of a hub repository, by its name."""
    return next(
        (facts for facts in FAMILIES.values() if any(fnmatch(model_id, name) for name in facts.model_ids)), None
    )


def not_trained(entry: str) -> str | None:
    """Return the unsupported model that an entry of `model_id_with_origin_paths` belongs to, if known."""
    known = (item for facts in FAMILIES.values() for item in facts.not_trained.items())
    return next((what for pattern, what in known if fnmatch(entry, pattern)), None)


def recognise(names: Collection[str], facts: FamilyFacts) -> tuple[ComponentFacts, Layout] | None:
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


def component_at(path: str, facts: FamilyFacts, model_id: str = "") -> ComponentFacts | None:
    """Return the component of a path in a recipe, such as `transformer/diffusion_pytorch_model*.safetensors`.

    For a path that fits several, such as `diffusion_pytorch_model.safetensors`, the repository's name may decide.
    """
    named = [(component, pattern) for component in facts.components for pattern in component.file_patterns]
    return next(
        (component for component, pattern in named if ":" in pattern and fnmatch(f"{model_id}:{path}", pattern)),
        next((component for component, pattern in named if fnmatch(path, pattern)), None),
    )


def recognise_family(names: Collection[str]) -> FamilyFacts | None:
    """Return the family whose diffusion transformer has these tensor names."""
    for facts in FAMILIES.values():
        found = recognise(names, facts)
        if found and found[0].name == facts.denoiser:
            return facts
    return None

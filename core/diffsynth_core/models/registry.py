"""Table of the families."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from diffsynth_core.config.choices import LoraFormat
from diffsynth_core.data.conditions import Condition
from diffsynth_core.errors import Problem, suggest
from diffsynth_core.models.flux.spec import FLUX
from diffsynth_core.models.flux2.spec import FLUX2
from diffsynth_core.models.qwen_image.spec import QWEN_IMAGE
from diffsynth_core.models.spec import FamilyFacts
from diffsynth_core.models.wan.spec import WAN

if TYPE_CHECKING:
    from diffsynth_core.models.family import Family

FAMILIES: dict[str, FamilyFacts] = {facts.name: facts for facts in (QWEN_IMAGE, WAN, FLUX, FLUX2)}
"""Name -> facts."""


def all_conditions() -> dict[str, Condition]:
    """Return metadata column -> the first condition that a family reads there."""
    found: dict[str, Condition] = {}
    for condition in (condition for facts in FAMILIES.values() for condition in facts.conditions):
        found.setdefault(condition.column, condition)
    return found


def all_frame_inputs() -> dict[str, None]:
    """Return the extra inputs that are frames of the target clip, of all families."""
    return dict.fromkeys(name for facts in FAMILIES.values() for name in facts.frame_inputs)


def image_inputs() -> tuple[str, ...]:
    """Return the extra inputs that are images, of all families."""
    return tuple(dict.fromkeys((*all_conditions(), *all_frame_inputs())))


def all_later_inputs() -> dict[str, None]:
    """Return the extra inputs of DiffSynth-Studio that are not supported yet."""
    return dict.fromkeys(name for facts in FAMILIES.values() for name in facts.later_inputs)


def unknown_family(name: str, config: Path | None = None) -> Problem:
    """Return the problem of an unknown family, with the closest name as the hint; `config`: the file that names it."""
    near = suggest(name, FAMILIES)
    hint = f"did you mean `{near}`?" if near else f"known: {', '.join(FAMILIES)}"
    where = f" (`{config}`)" if config else ""
    return Problem(f"unknown family `{name}`{where}", hint, wrong_use=True)


def load_family(name: str) -> "Family":
    """Return the implementation of a family; imports torch and the model libraries."""
    module_name, _, class_name = FAMILIES[name].implementation.partition(":")
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

"""The tiny models of a rehearsal: found for the models that a recipe names, and written in the real file layout."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.quant_options import rename_entries
from diffsynth_core.config.resolve import Resolved
from diffsynth_core.errors import DiffSynthError, Problem, report
from diffsynth_core.files import make_numbered_folder
from diffsynth_core.hub.model_files import expand_local, locate, split_entry
from diffsynth_core.hub.model_folder import is_shipped
from diffsynth_core.models.bases import shapes_in
from diffsynth_core.models.recognition import component_at, family_of_model, recognize, recognize_family
from diffsynth_core.models.registry import FAMILIES, load_family
from diffsynth_core.models.spec import ComponentFacts, FamilyFacts, Variant
from diffsynth_core.planning.model.file_assignment import FoundPart, read_file_set

WEIGHTS_VERSION = 5
"""Incremented when the tiny weights change, so that older ones are not reused."""


@dataclass(frozen=True)
class NamedModel:
    """A model in the parameters: an entry of a repository, or local files with their content.

    Attributes:
        calls: names that other parameters may use for it.
    """

    origin: str
    calls: tuple[str, ...]
    parts: tuple[FoundPart, ...] = ()


def named_models(parameters: Parameters) -> list[NamedModel]:
    """Return the models in the parameters; report files that are missing or unreadable."""
    entries = parameters.model_id_with_origin_paths
    fetched = [entry for entry in entries if split_entry(entry) and not expand_local(entry)]
    own = [entry for entry in entries if entry not in fetched]
    file_sets, gone = locate(parameters.model_paths, own, Path())
    report(*gone)
    named = [NamedModel(entry, (entry,)) for entry in fetched]
    for file_set in file_sets:
        try:
            named.append(NamedModel(file_set.origin, file_set.entries, tuple(read_file_set(file_set))))
        except DiffSynthError as error:
            report(*error.problems)
    return named


def family_of(resolved: Resolved, named: Sequence[NamedModel]) -> FamilyFacts | None:
    """Return the family of the recipe, or of the repositories, or of local files."""
    if resolved.family:
        return FAMILIES.get(resolved.family)
    for model in named:
        parts = None if model.parts else split_entry(model.origin)
        if parts and (facts := family_of_model(parts[0])):
            return facts
    known = (recognize_family(found.names) for model in named for found in model.parts)
    return next(filter(None, known), None)


def swap_models(
    parameters: Parameters, named: Sequence[NamedModel], facts: FamilyFacts, base: Path
) -> dict[str, object]:
    """Return model parameters that name tiny components, which are written if they do not exist yet."""
    substitute = variant_of(named, facts, parameters.extra_inputs).model_id
    swapped = [_swap_files(model, facts, substitute, base) for model in named]
    entries_of = {call: entries for model, entries in zip(named, swapped, strict=True) for call in model.calls}
    float8 = [entry for call in parameters.fp8_models for entry in entries_of.get(call, (call,))]
    return {
        **dict.fromkeys(facts.tokenizers),
        "model_id_with_origin_paths": tuple(entry for entries in swapped for entry in entries),
        "model_paths": (),
        "fp8_models": tuple(dict.fromkeys(float8)),
        "quant_options": rename_entries(parameters.quant_options, lambda entry: entries_of.get(entry, (entry,))),
        "offload_models": (),
    }


def variant_of(named: Sequence[NamedModel], facts: FamilyFacts, inputs: tuple[str, ...]) -> Variant:
    """Return the variant of the denoiser: from the headers of local files, or from the name of the repository."""
    for model in named:
        for stored in model.parts:
            found = recognize(stored.names, facts)
            if found and found[0].name == facts.denoiser:
                return facts.variant({facts.denoiser: shapes_in(stored.part, found[1])}, inputs, model.origin)
        parts = None if model.parts else split_entry(model.origin)
        component = component_at(parts[1], facts, parts[0]) if parts else None
        if component and component.name == facts.denoiser:
            return facts.variant({}, inputs, model.origin)
    return facts.variant({}, inputs, "")


def _swap_files(model: NamedModel, facts: FamilyFacts, substitute: str, base: Path) -> tuple[str, ...]:
    """Return the entries of tiny components for a model, written if they do not exist yet.

    Local files are replaced with those of `substitute`, a published model.
    """
    parts = None if model.parts else split_entry(model.origin)
    if parts:
        components = [component_at(parts[1], facts, parts[0])]
    else:
        recognized = [recognize(found.names, facts) for found in model.parts]
        components = [found[0] if found else None for found in recognized]
    entries = []
    for component in components:
        if component is None:
            report(
                Problem(
                    f"`{model.origin}` is not a component of {facts.title} that can be rehearsed",
                    "specify the files as a recipe does",
                    wrong_use=True,
                )
            )
            return (model.origin,)
        source = parts or (f"local/{substitute.rpartition('/')[2]}", f"{_folder_of(component)}/model.safetensors")
        entries.append(_ensure_tiny(component, *source, facts, base))
    return tuple(entries)


def _ensure_tiny(component: ComponentFacts, model_id: str, pattern: str, facts: FamilyFacts, base: Path) -> str:
    """Return the entry of a tiny component, written if it does not exist yet; a shipped model is used as it is."""
    if is_shipped(model_id):
        return f"{model_id}:{pattern}"
    marker = base / "written" / hashlib.sha256(f"{model_id}:{pattern}".encode()).hexdigest()
    if not marker.is_file():
        _write_tiny(base, component.name, model_id, pattern, facts)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    return f"{model_id}:{pattern}"


def _folder_of(component: ComponentFacts) -> str:
    """Return a folder in which repositories keep the component."""
    return next(pattern.removesuffix("/*") for pattern in component.file_patterns if pattern.endswith("/*"))


def _write_tiny(base: Path, component: str, model_id: str, pattern: str, facts: FamilyFacts) -> None:
    """Write to a temporary folder, then move file by file: concurrent rehearsals only see complete files."""
    staging = make_numbered_folder(base, lambda number: f".writing-{number}")
    load_family(facts.name).write_tiny_weights(staging, component, model_id, pattern)
    for path in sorted(staging.rglob("*")):
        if path.is_file():
            target = base / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    shutil.rmtree(staging)

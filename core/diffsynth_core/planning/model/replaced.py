"""Entries of a recipe that `model_paths` replaces. No torch."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.quant_options import rename_entries
from diffsynth_core.config.resolve import Resolved
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.files import model_base_path
from diffsynth_core.hub.model_files import FileSet, locate, split_entry
from diffsynth_core.models.recognition import component_at, recognize_component
from diffsynth_core.models.registry import FAMILIES
from diffsynth_core.models.spec import FamilyFacts
from diffsynth_core.planning.model.file_assignment import read_file_set


def drop_replaced_entries(resolved: Resolved) -> Resolved:
    """Remove entries of `model_id_with_origin_paths` whose components are in `model_paths`, if that takes precedence.

    Components are recognized by the content of the files. Other parameters that name such an entry, such as
    `fp8_models`, then name the replacing files.
    """
    parameters = resolved.parameters
    if not resolved.takes_precedence("model_paths", "model_id_with_origin_paths"):
        return resolved
    replacements = _replacements(parameters, FAMILIES.get(resolved.family or ""))
    if not replacements:
        return resolved
    kept = tuple(entry for entry in parameters.model_id_with_origin_paths if entry not in replacements)
    changed = {
        name: tuple(dict.fromkeys(replacements.get(entry, entry) for entry in getattr(parameters, name)))
        for name in ("fp8_models", "offload_models")
        if getattr(parameters, name)
    }
    quantized = rename_entries(parameters.quant_options, lambda entry: (replacements.get(entry, entry),))
    update = {"model_id_with_origin_paths": kept, "quant_options": quantized, **changed}
    return replace(resolved, parameters=parameters.model_copy(update=update))


def local_components(parameters: Parameters, family: FamilyFacts | None) -> dict[str, FileSet]:
    """Return the components in `model_paths`, recognized by the tensors of readable files."""
    found: dict[str, FileSet] = {}
    for file_set in locate(parameters.model_paths, (), model_base_path())[0]:
        with suppress(DiffSynthError):  # reported when the run is planned
            for stored in read_file_set(file_set):
                if known := recognize_component(stored.names, family):
                    found.setdefault(known[1].name, file_set)
    return found


def _replacements(parameters: Parameters, family: FamilyFacts | None) -> Mapping[str, str]:
    """Return entry -> name of the files that replace it."""
    local = local_components(parameters, family)
    families = [family] if family else list(FAMILIES.values())
    found: dict[str, str] = {}
    for entry in parameters.model_id_with_origin_paths if local else ():
        model_id, pattern = split_entry(entry) or ("", entry)
        named = (component_at(pattern, facts, model_id) for facts in families)
        component = next(filter(None, named), None)
        if component and component.name in local:
            found[entry] = local[component.name].entries[0]
    return found

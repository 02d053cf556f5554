"""The model that draws: its files, with those of a full checkpoint in place of one component's. No torch."""

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffsynth_core.config.origins import Origin
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.resolve import Resolved
from diffsynth_core.errors import DiffSynthError, Problem, list_names, report
from diffsynth_core.hub.model_files import expand_entry, expand_local, split_entry
from diffsynth_core.hub.model_folder import model_folder
from diffsynth_core.models.recognition import component_at, recognize_component
from diffsynth_core.models.registry import FAMILIES
from diffsynth_core.models.spec import FamilyFacts
from diffsynth_core.planning.model.components import find_components, shape_faults, stored_shares
from diffsynth_core.planning.model.lora_files import find_fused_lora
from diffsynth_core.planning.model.model_plan import ModelPlan
from diffsynth_core.planning.model.replaced import drop_replaced_entries, local_components
from diffsynth_core.weights.base_files import Part, read_parts
from diffsynth_core.weights.lora_keys import is_lora_key

CONFIG = "config.json"
"""Configuration next to the weights of a component."""
_PIPE = re.compile(r"pipe\.\w+\.")
BY_CHECKPOINT = Origin("flag", "`--checkpoint`", rank=10**6)
"""Origin of model files that a checkpoint replaces: it takes precedence over all others."""


@dataclass(frozen=True)
class Replaced:
    """What a checkpoint replaces.

    Attributes:
        origin: what the parameters name for the component.
        config: its config.json, if that is on disk: a checkpoint has none.
    """

    component: str
    origin: str
    config: Path | None


def with_checkpoint(resolved: Resolved, path: Path | None, base: Path) -> tuple[Resolved, Replaced | None]:
    """Return the parameters with a full checkpoint in place of the files of its component. Reports problems.

    Args:
        base: folder of downloaded models.
    """
    if path is None:
        return drop_replaced_entries(resolved), None
    facts, component = FAMILIES.get(resolved.family or ""), _component_in(path, resolved)
    if component is None:
        return drop_replaced_entries(resolved), None
    parameters = resolved.parameters
    local = local_components(parameters, facts).get(component)
    kept = tuple(group for group in parameters.model_paths if not local or not set(group) & set(local.entries))
    changed = replace(
        drop_replaced_entries(resolved),
        parameters=parameters.model_copy(update={"model_paths": (*kept, (str(path),))}),
        origins={**resolved.origins, "model_paths": BY_CHECKPOINT},
    )
    named = local.origin if local else _entry_of(component, parameters, facts)
    return drop_replaced_entries(changed), Replaced(component, named, _config_of(named, local is not None, base))


def with_inputs(resolved: Resolved, inputs: Sequence[str]) -> Resolved:
    """Return the parameters with extra inputs that are given besides their own."""
    asked = tuple(dict.fromkeys((*resolved.parameters.extra_inputs, *inputs)))
    return replace(resolved, parameters=resolved.parameters.model_copy(update={"extra_inputs": asked}))


def find_model(
    resolved: Resolved, replaced: Replaced | None, inputs: Sequence[str], base: Path
) -> tuple[Resolved, ModelPlan | None]:
    """Return the components in the files of the parameters, and the parameters with the defaults of their family.

    Reports problems; None if not even the family is known.

    Args:
        inputs: extra inputs that are given besides those of the parameters.
    """
    if resolved.incomplete:
        return resolved, None
    resolved = with_inputs(resolved, inputs)
    found = find_components(resolved.parameters, resolved.family, base)
    if found is None:
        return resolved, None
    if resolved.family is None:
        resolved = resolved.with_defaults_of(found.facts.name)
    found = _as_named(found, replaced, resolved.parameters.extra_inputs) if replaced else found
    report(*shape_faults(found))
    fused_lora = find_fused_lora(resolved.parameters, found)
    return resolved, replace(found, stored=stored_shares(found), fused_lora=fused_lora)


def _as_named(found: ModelPlan, replaced: Replaced, inputs: tuple[str, ...]) -> ModelPlan:
    """Return the model with what the name and the folder of the replaced files tell: their kind and configuration."""
    files = found.components.get(replaced.component)
    if files is None:
        return found
    components = dict(found.components)
    if files.config_path is None:
        components[replaced.component] = replace(files, config_path=replaced.config)
    variant = found.variant
    if replaced.component == found.facts.denoiser and replaced.origin:
        variant = found.facts.variant(found.shapes, inputs, replaced.origin)
    return replace(found, components=components, variant=variant)


def _component_in(path: Path, resolved: Resolved) -> str | None:
    """Return the component whose full weights are in a checkpoint; None if it cannot replace one, which is reported,
    or is unknown, which finding the components reports.
    """
    paths = expand_local(str(path))
    if not paths:
        what = "holds no weights" if path.is_dir() else "does not exist"
        hint = "pass a checkpoint file, or the folder of its shards"
        report(Problem(f"`--checkpoint` `{path}` {what}", hint, wrong_use=True))
        return None
    try:
        parts = read_parts(paths)
    except DiffSynthError as error:
        report(*error.problems)
        return None
    keys = [f"{part.prefix}{name}" for part in parts for name in part.tensors]
    adapted = [key for key in keys if is_lora_key(key)]
    split = f"split it with `diffsynth split-ckpt {path} --output_path DIR`"
    if adapted and len(adapted) < len(keys):
        what = f"`--checkpoint` `{path}` holds a LoRA besides full weights"
        report(Problem(what, f"{split}, and pass the parts with `--checkpoint` and `--lora`", wrong_use=True))
        return None
    if adapted:
        report(Problem(f"`--checkpoint` `{path}` is a LoRA", f"pass `--lora {path}`", wrong_use=True))
        return None
    prefixes = {
        part.prefix or (match[0] if (match := _PIPE.match(name)) else "") for part in parts for name in part.tensors
    }
    if len(prefixes) > 1 or any(map(_PIPE.match, prefixes)):
        names = list_names([prefix or "none" for prefix in sorted(prefixes)])
        whole = "several components" if len(prefixes) > 1 else "a component"
        what = f"`--checkpoint` `{path}` holds {whole}; the prefixes of its keys: {names}"
        report(Problem(what, f"{split}, which removes prefixes, and pass one part", wrong_use=True))
        return None
    return _recognized(path, parts[0], FAMILIES.get(resolved.family or ""))


def _recognized(path: Path, part: Part, facts: FamilyFacts | None) -> str | None:
    known = recognize_component(part.tensors, facts)
    if known is None:
        what = f"`--checkpoint` `{path}` is not a whole component{f' of {facts.title}' if facts else ''}"
        first = next(iter(part.tensors), "")
        hint = "pass a checkpoint with all weights of a component"
        report(Problem(f"{what}; its first key is `{part.prefix}{first}`", hint, wrong_use=True))
        return None
    return known[1].name


def _entry_of(component: str, parameters: Parameters, facts: FamilyFacts | None) -> str:
    """Return the entry of a component in the model parameters; empty if there is none."""
    for entry in parameters.model_id_with_origin_paths:
        model_id, pattern = split_entry(entry) or ("", entry)
        named = (component_at(pattern, one, model_id) for one in ([facts] if facts else FAMILIES.values()))
        found = next(filter(None, named), None)
        if found and found.name == component:
            return entry
    return ""


def _config_of(named: str, local: bool, base: Path) -> Path | None:
    """Return the config.json next to what the parameters name for a component, if it is on disk."""
    files = expand_entry(named, base) if named else []
    parts = None if local else split_entry(named)
    folders = [files[0].parent] if files else []
    folders += [model_folder(parts[0], base) / posixpath.dirname(parts[1])] if parts else []
    return next((folder / CONFIG for folder in folders if (folder / CONFIG).is_file()), None)

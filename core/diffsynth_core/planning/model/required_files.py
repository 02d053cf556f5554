"""Hub files that a run requires: weights, their config.json, tokenizers and processors. No torch."""

import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.recipes import recipe_names
from diffsynth_core.config.resolve import Resolved, resolve_stages
from diffsynth_core.config.tasks import TASKS
from diffsynth_core.errors import raise_if_any
from diffsynth_core.hub.client import Repository
from diffsynth_core.hub.file_requests import FileRequest, RepoFiles
from diffsynth_core.hub.model_files import download_command, expand_local, split_entry
from diffsynth_core.hub.model_folder import is_shipped
from diffsynth_core.models.recognition import component_at, family_of_model
from diffsynth_core.models.registry import FAMILIES
from diffsynth_core.models.spec import FamilyFacts, TokenizerFacts
from diffsynth_core.planning.data.two_stage import components_of
from diffsynth_core.planning.model.replaced import drop_replaced_entries, local_components

CONFIG = "config.json"
"""Configuration of a diffusers or transformers model."""


def required_files(parameters: Parameters, family: str | None) -> list[FileRequest]:
    """Return the hub files that a run requires; local paths are not included.

    Args:
        family: that of the recipe; None: that of the repositories.
    """
    facts = _facts(parameters.model_id_with_origin_paths, family)
    requests = [item for entry in needed_entries(parameters, family) for item in files_of_entry(entry, facts)]
    if facts and TASKS[parameters.task].encodes:
        requests += _tokenizer_requests(parameters, facts)
    return list(dict.fromkeys(requests))


def files_of_stages(stages: Sequence[Resolved]) -> list[FileRequest]:
    """Return the files that the runs of one command require, without duplicates."""
    used = map(drop_replaced_entries, stages)
    found = [item for resolved in used for item in required_files(resolved.parameters, resolved.family)]
    return list(dict.fromkeys(found))


def files_of_recipe(recipe: str) -> list[FileRequest]:
    """Return the files that all stages of a recipe require.

    Raises:
        FaultsFound: if there is no such recipe.
    """
    stages = resolve_stages({"recipe": recipe})
    raise_if_any([problem for resolved in stages for problem in resolved.problems])
    return files_of_stages(stages)


def files_of_entry(entry: str, facts: FamilyFacts | None = None) -> list[FileRequest]:
    """Return the files of one `model_id:glob`, with the config.json in the same folder; none if they are local.

    If the family knows a mirror of the file, that is an alternative source.
    """
    parts = split_entry(entry)
    if parts is None or expand_local(entry) or is_shipped(parts[0]):
        return []
    model_id, pattern = parts
    name = pattern.rpartition("/")[2]
    mirror = split_entry(facts.mirrors.get(name, "")) if facts else None
    weights = FileRequest(tuple(_repo_files(*source) for source in (parts, mirror) if source))
    folder = posixpath.dirname(pattern)
    if any(character in folder for character in "*?["):
        return [weights]
    return [weights, FileRequest((_repo_files(model_id, posixpath.join(folder, CONFIG)),), optional=True)]


def needed_entries(parameters: Parameters, family: str | None) -> list[str]:
    """Return the entries whose files a run requires.

    A precompute task does not require the transformer, and a train task does not require the encoders.
    """
    entries, task = parameters.model_id_with_origin_paths, TASKS[parameters.task]
    facts = FAMILIES.get(family or "")
    if facts is None or (task.encodes and task.trains):
        return list(entries)
    needed = components_of(task, facts.variant({}, parameters.extra_inputs, ""))

    def is_unused(entry: str) -> bool:
        model_id, pattern = split_entry(entry) or ("", entry)
        component = component_at(pattern, facts, model_id)
        if component is None:
            return False
        return component.name not in needed if task.trains else component.name == facts.denoiser

    return [entry for entry in entries if not is_unused(entry)]


def download_hint(entry: str, recipe: str | None) -> str:
    """Return the command that downloads an entry, with all others of the recipe if the entry is one of its own."""
    if recipe in recipe_names():
        stages = resolve_stages({"recipe": recipe})
        if any(entry in resolved.parameters.model_id_with_origin_paths for resolved in stages):
            return f"diffsynth download {recipe}"
    return download_command(entry)


def _facts(entries: tuple[str, ...], family: str | None) -> FamilyFacts | None:
    """Return the named family, or the first one that has one of the repositories."""
    if family in FAMILIES:
        return FAMILIES[family]
    parts = (split_entry(entry) for entry in entries)
    return next((facts for part in parts if part and (facts := family_of_model(part[0]))), None)


def _tokenizer_requests(parameters: Parameters, facts: FamilyFacts) -> Iterator[FileRequest]:
    """Yield the folders of tokenizers and processors that are set, or their default sources."""
    for parameter, tokenizer in facts.tokenizers.items():
        if tokenizer.inputs and not set(tokenizer.inputs) & set(parameters.extra_inputs):
            continue
        given: str | None = getattr(parameters, parameter)
        if given:
            named = [] if Path(given).expanduser().is_dir() else [given]
        else:
            named = _named_tokenizers(parameters, facts, tokenizer)
        sources = [_tokenizer_files(*parts, tokenizer) for text in named if (parts := split_entry(text))]
        if sources and not is_shipped(sources[0].repository.name):
            yield FileRequest(tuple(sources))


def _named_tokenizers(parameters: Parameters, facts: FamilyFacts, tokenizer: TokenizerFacts) -> list[str]:
    """Return the default sources of a tokenizer: the repositories of its component, and the family's own.

    Empty if there is a local one next to local files of the component, or if the component is not in the parameters.
    """
    adjacent = [
        f"{model_id}:{path}"
        for model_id, pattern in filter(None, map(split_entry, parameters.model_id_with_origin_paths))
        if (component := component_at(pattern, facts, model_id)) and component.name == tokenizer.component
        for folder in tokenizer.folders
        if not (path := posixpath.normpath(posixpath.join(posixpath.dirname(pattern), folder))).startswith("..")
    ]
    files = local_components(parameters, facts).get(tokenizer.component)
    own = [files.paths[0].parent / folder for folder in tokenizer.folders] if files else []
    if any(folder.is_dir() for folder in own) or not (adjacent or files):
        return []
    return list(dict.fromkeys([*adjacent, tokenizer.default]))


def _repo_files(model_id: str, pattern: str) -> RepoFiles:
    """Return the files of a glob; one that ends with `/` selects the files of the folder."""
    return RepoFiles(Repository("model", model_id), (pattern + "*" if pattern.endswith("/") else pattern,))


def _tokenizer_files(model_id: str, folder: str, tokenizer: TokenizerFacts) -> RepoFiles:
    """Return the files of a tokenizer's folder, of which one layout must be complete."""
    folder = folder.rstrip("/")
    layouts = tuple(tuple(f"{folder}/{name}" for name in layout) for layout in tokenizer.layouts)
    return RepoFiles(Repository("model", model_id), (f"{folder}/*",), layouts)

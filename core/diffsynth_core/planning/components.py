"""Which files are which component, and where the tokenizers lie."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import DiffSynthError, Problem, suggest
from diffsynth_core.families.interface import ComponentFiles, FamilyFacts, Shapes
from diffsynth_core.families.table import FAMILIES, load_family, recognise_component, recognise_family, unknown_family
from diffsynth_core.planning.tokenizers import find_tokenizers
from diffsynth_core.sources.model_files import FileSet, locate
from diffsynth_core.state_dicts.headers import TensorHeader, read_headers


@dataclass(frozen=True)
class FoundComponents:
    """The components of a run, the shapes of their tensors (by the names of our modules), and tokenizer folders."""

    facts: FamilyFacts
    components: Mapping[str, ComponentFiles]
    shapes: Mapping[str, Shapes]
    tokenizers: Mapping[str, Path]


def find_components(
    parameters: Parameters, family: str | None, base: Path, problems: list[Problem]
) -> FoundComponents | None:
    """Recognise the components in the files that the model parameters name.

    Adds to `problems`; None when not even the family can be told.
    """
    entries = parameters.model_id_with_origin_paths
    if not entries and not parameters.model_paths:
        problems.append(
            Problem(
                "no model files are named",
                "give `--recipe`, `--model_paths` or `--model_id_with_origin_paths`",
                wrong_use=True,
            )
        )
        return None
    file_sets, missing = locate(parameters.model_paths, entries, base)
    problems += missing
    headers = [(file_set, tensors) for file_set in file_sets if (tensors := _read(file_set, problems)) is not None]
    facts = _family(family, headers, problems)
    if facts is None:
        return None
    components: dict[str, ComponentFiles] = {}
    shapes: dict[str, Shapes] = {}
    for file_set, tensors in headers:
        component = recognise_component(tensors, facts)
        if component is None:
            problems.append(_unrecognised(file_set, tensors, facts))
        elif component.name in components:
            first = components[component.name].origin
            problems.append(
                Problem(
                    f"`{file_set.origin}` and `{first}` are both the {component.name} of {facts.title}",
                    "name one of them",
                    wrong_use=True,
                )
            )
        else:
            config = file_set.paths[0].parent / "config.json"
            components[component.name] = ComponentFiles(
                component.name, file_set.origin, file_set.paths, config if config.is_file() else None
            )
            shapes[component.name] = {component.module_key(name): tensor.shape for name, tensor in tensors.items()}
    if len(headers) == len(entries) + len(parameters.model_paths):
        absent = [component for component in facts.components if component.name not in components]
        problems += [
            Problem(
                f"the files named hold no {component.name} ({component.title}) for {facts.title}",
                "name its files too",
                wrong_use=True,
            )
            for component in absent
        ]
    _check_offloaded(parameters, problems)
    tokenizers = find_tokenizers(parameters, facts, components, base, problems)
    return FoundComponents(facts, components, shapes, tokenizers)


def shape_faults(found: FoundComponents) -> list[Problem]:
    """How files and configurations disagree; imports the model libraries to ask them."""
    from diffsynth_core.families.loading import shape_problems

    family = load_family(found.facts.name)
    return [problem for files in found.components.values() for problem in shape_problems(family, files)]


def _read(file_set: FileSet, problems: list[Problem]) -> dict[str, TensorHeader] | None:
    try:
        return read_headers(file_set.paths)
    except DiffSynthError as error:
        problems += error.problems
        return None


def _family(
    family: str | None, headers: list[tuple[FileSet, dict[str, TensorHeader]]], problems: list[Problem]
) -> FamilyFacts | None:
    if family:
        if family not in FAMILIES:
            problems.append(unknown_family(family))
        return FAMILIES.get(family)
    for _, tensors in headers:
        facts = recognise_family(tensors)
        if facts:
            return facts
    if headers:
        problems.append(
            Problem(
                "none of the model files is a diffusion transformer of a known family",
                f"known: {', '.join(FAMILIES)}",
                wrong_use=True,
            )
        )
    return None


def _unrecognised(file_set: FileSet, tensors: Mapping[str, TensorHeader], facts: FamilyFacts) -> Problem:
    other = recognise_family(tensors)
    what = (
        f"is the transformer of {other.title}, not a component of {facts.title}"
        if other
        else f"is no component of {facts.title}; it begins with `{next(iter(tensors), '')}`"
    )
    known = ", ".join(component.name for component in facts.components)
    return Problem(f"`{file_set.origin}` {what}", f"name files of its components: {known}", wrong_use=True)


def _check_offloaded(parameters: Parameters, problems: list[Problem]) -> None:
    """`offload_models` must name entries of the model parameters, so that a slip of the pen is not taken for them."""
    named = {*parameters.model_id_with_origin_paths, *(path for group in parameters.model_paths for path in group)}
    for entry in parameters.offload_models:
        if entry not in named:
            near = suggest(entry, named)
            hint = f"did you mean `{near}`?" if near else "write it as it stands there"
            problems.append(
                Problem(
                    f"`offload_models` names `{entry}`, which is no entry of the model parameters", hint, wrong_use=True
                )
            )

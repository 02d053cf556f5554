"""Assignment of files to components, and the folders of tokenizers."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.tasks import TASKS
from diffsynth_core.data.encoded_samples import EncodedSamples
from diffsynth_core.errors import DiffSynthError, Problem, collect_problems, report, report_missing
from diffsynth_core.hub.model_files import FileSet, MissingFiles, expand_entry, locate, split_entry
from diffsynth_core.models.hub_shapes import hub_shapes
from diffsynth_core.models.recognition import component_at
from diffsynth_core.models.registry import FAMILIES, load_family
from diffsynth_core.models.shapes import layers_of_blocks
from diffsynth_core.models.size_facts import HubModelSize, unknown_size
from diffsynth_core.models.spec import (
    ComponentFacts,
    ComponentFiles,
    FamilyFacts,
    Shapes,
    Variant,
)
from diffsynth_core.models.weight_store import WeightStore, find_store
from diffsynth_core.planning.data.two_stage import components_of, kind_problems, modified_encoders
from diffsynth_core.planning.model.file_assignment import (
    AssignedFiles,
    FoundPart,
    assign_files,
    family_named,
    find_family,
    read_file_set,
    refused_models,
)
from diffsynth_core.planning.model.model_plan import ModelPlan
from diffsynth_core.planning.model.required_files import download_hint, needed_entries
from diffsynth_core.planning.model.storage import check_entries, check_storage, storage_of
from diffsynth_core.planning.model.tokenizers import find_tokenizers
from diffsynth_core.progress import pluralize


def find_components(
    parameters: Parameters, family: str | None, base: Path, encoded: EncodedSamples | None = None
) -> ModelPlan | None:
    """Recognize the components in the files of the model parameters.

    Reports problems; returns None if not even the family is known. Published sizes are used for missing files, so that
    other problems are reported together with them.

    Args:
        encoded: samples that a train task trains on; they must fit the denoiser.
    """
    entries = parameters.model_id_with_origin_paths
    if not entries and not parameters.model_paths:
        report(
            Problem(
                "no model files given",
                "pass `--recipe`, `--model_paths` or `--model_id_with_origin_paths`",
                wrong_use=True,
            )
        )
        return None
    refused = refused_models(entries)
    report(*refused)
    if refused:
        return None
    requested = _requested_entries(parameters, family, base)
    files = _locate(parameters, requested, family, base)
    report(*files.problems)
    report_missing(*files.missing)
    parts, complete = files.parts, files.complete
    facts = find_family(family, parts, complete, parameters.config) or (None if complete else family_named(entries))
    if facts is None:
        return None
    assigned = assign_files(parts, facts, parameters)
    published = _use_published_sizes(
        [entry for entry in requested if entry not in files.entries], facts, parameters, assigned
    )
    components, shapes = assigned.components, assigned.shapes
    variant = _variant(parameters, facts, components, shapes)
    task = TASKS[parameters.task]
    needed = components_of(task, variant)
    absent = [name for name in variant.components if name in needed and name not in {*components, *assigned.reported}]
    # Each file that is no known component may be a missing one, so as many absences are not reported.
    unplaced = len(parts) - (len(components) - len(published)) - len(assigned.reported)
    if complete and len(absent) > unplaced:
        report(*[_missing(facts.component(name), variant) for name in absent])
    report(*modified_encoders(parameters, task, variant))
    origins = {name: files.origin for name, files in components.items() if name not in published}
    report(*_mismatches(facts, variant, origins, {name: shapes[name] for name in origins}))
    report(*(_encoded_mismatches(facts, variant, shapes, encoded) if encoded else []))
    report(*_unused_components(facts, parameters.extra_inputs, components))
    check_storage(parameters, components, shapes)
    check_entries(parameters, "offload_models", parameters.offload_models)
    single_stage = task.encodes and task.trains
    used = {name: files for name, files in components.items() if single_stage or name in needed}
    unused_components = {name: files for name, files in components.items() if name not in used}
    with collect_problems() as of_tokenizers:
        tokenizers = find_tokenizers(parameters, facts, used, shapes, base) if task.encodes else {}
    report_missing(*(of_tokenizers if files.clear else _not_downloadable(of_tokenizers)))
    kept = {name: shapes[name] for name in used}
    return ModelPlan(
        facts=facts,
        variant=variant,
        components=used,
        shapes=kept,
        tokenizers=tokenizers,
        unused_components=unused_components,
        published=published,
    )


@dataclass(frozen=True)
class _Located:
    """The files in the model parameters.

    Attributes:
        entries: entries whose files are on disk.
        missing: problems of repository files that are not on disk.
        complete: all files are on disk and readable.
        clear: all files in `model_paths` are on disk and readable.
    """

    parts: Sequence[FoundPart]
    entries: frozenset[str]
    problems: Sequence[Problem]
    missing: Sequence[Problem]
    complete: bool
    clear: bool


def _locate(parameters: Parameters, requested: Sequence[str], family: str | None, base: Path) -> _Located:
    """Find and read the files of `model_paths` and of the entries `requested`.

    If a local path is wrong, it is unknown which entry it replaces, so no entry is reported as missing.
    """
    local, gone = locate(parameters.model_paths, (), base)
    command_for = partial(download_hint, recipe=parameters.recipe)
    fetched, not_here = locate((), requested, base, _mirrors(family), command_for)
    local_parts, unread = _read(local)
    parts, damaged = _read(fetched)
    clear = not (gone or unread)
    wrong = _not_downloadable(not_here)
    return _Located(
        [*local_parts, *parts],
        frozenset(entry for file_set in fetched for entry in file_set.entries),
        [*gone, *wrong, *unread, *damaged],
        [problem for problem in not_here if problem not in wrong] if clear else [],
        not (gone or not_here or unread or damaged),
        clear,
    )


def _not_downloadable(problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems that a download would not solve."""
    return [problem for problem in problems if not isinstance(problem, MissingFiles)]


def _use_published_sizes(
    entries: Iterable[str], facts: FamilyFacts, parameters: Parameters, assigned: AssignedFiles
) -> dict[str, HubModelSize]:
    """Add published components to `assigned` for entries whose files are missing, and return their sizes.

    The size is unknown if the model is.
    """
    found: dict[str, HubModelSize] = {}
    for entry in entries:
        parts = split_entry(entry)
        component = component_at(parts[1], facts, parts[0]) if parts else None
        if not parts or not component or component.name in assigned.components:
            continue
        published = facts.published_sizes(component.name, *parts) or unknown_size(component.name, entry)
        settings = {name: True for name in component.settings if getattr(parameters, name)}
        assigned.components[component.name] = ComponentFiles(
            component.name,
            entry,
            (),
            None,
            component.layouts[0],
            settings=settings,
            storage=storage_of((entry,), parameters),
        )
        assigned.shapes[component.name] = hub_shapes(facts, published)
        found[component.name] = published
    return found


def _requested_entries(parameters: Parameters, family: str | None, base: Path) -> tuple[str, ...]:
    """Return the entries whose files are required, and those whose files exist anyway."""
    needed = needed_entries(parameters, family)
    return tuple(
        entry for entry in parameters.model_id_with_origin_paths if entry in needed or expand_entry(entry, base)
    )


def _variant(
    parameters: Parameters,
    facts: FamilyFacts,
    components: Mapping[str, ComponentFiles],
    shapes: Mapping[str, Shapes],
) -> Variant:
    """Return the variant of the denoiser; that of most models of the family if it is unsupported, which is
    reported.
    """
    named = [*parameters.model_id_with_origin_paths, *(path for group in parameters.model_paths for path in group)]
    tokenizer_paths = [given for parameter in facts.tokenizers if (given := getattr(parameters, parameter))]
    denoiser = components.get(facts.denoiser)
    origin = denoiser.origin if denoiser else ", ".join([*named, *tokenizer_paths])
    try:
        return facts.variant(shapes, parameters.extra_inputs, origin)
    except DiffSynthError as error:
        report(*error.problems)
        return facts.variant({}, parameters.extra_inputs, origin)


def _mirrors(family: str | None) -> dict[str, str]:
    """Return the mirrors of files that the family knows, or all families if it is unknown."""
    known: Iterable[FamilyFacts] = [FAMILIES[family]] if family in FAMILIES else FAMILIES.values()
    return {name: mirror for facts in known for name, mirror in facts.mirrors.items()}


def _mismatches(
    facts: FamilyFacts, variant: Variant, origins: Mapping[str, str], shapes: Mapping[str, Shapes]
) -> list[Problem]:
    """Return problems of components whose output the denoiser cannot read: files of different models."""
    problems = []
    for constraint in facts.shape_constraints:
        source, target = (
            shapes.get(name, {}).get(tensor, ())[axis : axis + 1]
            for name, (tensor, axis) in ((constraint.component, constraint.source), (facts.denoiser, constraint.target))
        )
        if source and target and target != (source[0] * constraint.parts,):
            problems.append(
                Problem(
                    f"the {constraint.component} from `{origins[constraint.component]}` {constraint.verb} {constraint.what} with {pluralize(source[0], 'channel')}, "
                    f"but the {facts.denoiser} of {variant.title} expects {target[0] // constraint.parts}",
                    constraint.way_out or f"use the {constraint.component} of the same model",
                    wrong_use=True,
                )
            )
    return problems


def _encoded_mismatches(
    facts: FamilyFacts, variant: Variant, shapes: Mapping[str, Shapes], encoded: EncodedSamples
) -> list[Problem]:
    """Return why the denoiser cannot train on encoded samples: another variant, or encoders of another width."""
    problems = kind_problems(encoded, facts, variant)
    if problems or facts.denoiser not in shapes:
        return problems
    made: dict[str, Shapes] = {
        name: {tensor: tuple(shape) for tensor, shape in recorded.items()}
        for name, recorded in encoded.origin.shapes.items()
    }
    origins = dict.fromkeys(made, str(encoded.folder))
    mismatches = _mismatches(facts, variant, origins, {**made, facts.denoiser: shapes[facts.denoiser]})
    return [replace(problem, hint="encode the samples with the components of the same model") for problem in mismatches]


def _unused_components(
    facts: FamilyFacts, inputs: tuple[str, ...], components: Mapping[str, ComponentFiles]
) -> Iterator[Problem]:
    """Yield problems of components that have no effect without an extra input that is not requested."""
    for name, files in components.items():
        needed = facts.component(name).inputs
        if needed and not set(needed) & set(inputs):
            yield Problem(
                f"`{files.origin}` is the {name} of {facts.title}, but `{needed[0]}` is not in `extra_inputs`",
                f"pass `--extra_inputs {','.join((*inputs, needed[0]))}`, or remove its files",
                wrong_use=True,
            )


def _missing(component: ComponentFacts, variant: Variant) -> Problem:
    return Problem(
        f"no {component.name} weights ({component.title}) given for {variant.title}",
        "add them to `--model_paths` or `--model_id_with_origin_paths`",
        wrong_use=True,
    )


def shape_faults(found: ModelPlan) -> list[Problem]:
    """Return differences between files and configurations; imports the model libraries."""
    from diffsynth_core.models.loading import shape_problems

    family = load_family(found.facts.name)
    there = [files for name, files in found.components.items() if name not in found.published]
    return [problem for files in there for problem in shape_problems(family, files)]


def stored_shares(found: ModelPlan) -> dict[str, float | None]:
    """Return component -> fraction of its weights in the layers of its weight store, if it has any; None: unknown."""
    from diffsynth_core.models.loading import build_empty, stored_layers

    family = load_family(found.facts.name)
    shares: dict[str, float | None] = {}
    for name, files in found.components.items():
        if files.storage == "plain":
            continue
        if name in found.published:
            shapes = found.shapes[name]
            shares[name] = stored_share(shapes, find_store(files.storage)) if shapes else None
        else:
            module = build_empty(family, files)
            sizes = {weight: parameter.numel() for weight, parameter in module.named_parameters()}
            layers = stored_layers(found.facts.component(name), module, find_store(files.storage))
            shares[name] = sum(sizes[f"{layer}.weight"] for layer in layers) / sum(sizes.values())
    return shares


def stored_share(shapes: Shapes, store: WeightStore) -> float:
    """Return the fraction of a component's weights in linear layers of blocks that a store takes, from its shapes."""
    layers = filter(store.takes, layers_of_blocks(shapes))
    stored = sum(math.prod(shapes[f"{layer}.weight"]) for layer in layers)
    return stored / sum(map(math.prod, shapes.values()))


def _read(file_sets: Iterable[FileSet]) -> tuple[list[FoundPart], list[Problem]]:
    """Return the parts of all files, and the problems of unreadable files."""
    parts: list[FoundPart] = []
    problems: list[Problem] = []
    for file_set in file_sets:
        try:
            parts += read_file_set(file_set)
        except DiffSynthError as error:
            problems += error.problems
    return parts, problems

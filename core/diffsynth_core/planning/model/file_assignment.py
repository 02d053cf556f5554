"""Assigning the files of a run to the components of its family. No torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import Problem, report
from diffsynth_core.hub.model_files import FileSet, split_entry
from diffsynth_core.models.bases import shapes_in
from diffsynth_core.models.configs import config_beside
from diffsynth_core.models.recognition import (
    component_at,
    family_of_files,
    family_of_model,
    find_unsupported,
    not_trained,
    recognize,
    recognize_family,
)
from diffsynth_core.models.registry import FAMILIES, unknown_family
from diffsynth_core.models.spec import ComponentFacts, ComponentFiles, FamilyFacts, Shapes, UnsupportedCheckpoint
from diffsynth_core.planning.model.storage import storage_of
from diffsynth_core.weights.base_files import Part, read_parts
from diffsynth_core.weights.headers import TensorHeader


@dataclass(frozen=True)
class FoundPart:
    """The tensors below one prefix in a file set; `alone`: there are no others."""

    file_set: FileSet
    part: Part
    alone: bool = True

    @property
    def names(self) -> Mapping[str, TensorHeader]:
        """The tensors by key without the prefix."""
        return self.part.tensors


def read_file_set(file_set: FileSet) -> list[FoundPart]:
    """Return the parts of a file set.

    Raises:
        DiffSynthError: see `read_parts`.
    """
    parts = read_parts(file_set.paths, file_set.origin)
    return [FoundPart(file_set, part, len(parts) == 1) for part in parts]


@dataclass(frozen=True)
class AssignedFiles:
    """Files by component; `reported`: components whose absence a problem has explained already."""

    components: dict[str, ComponentFiles]
    shapes: dict[str, Shapes]
    reported: set[str]


def find_family(
    family: str | None,
    parts: Sequence[FoundPart],
    complete: bool,
    config: Path | None,
) -> FamilyFacts | None:
    """Return the family that `config` or a recipe names, or that of the transformer, which may be in a missing file
    set (if not `complete`).
    """
    if family:
        if family not in FAMILIES:
            report(unknown_family(family, config))
        return FAMILIES.get(family)
    repositories = (split_entry(found.file_set.origin) for found in parts)
    facts = family_of_files([found.names for found in parts], [place[0] if place else None for place in repositories])
    if parts and complete and facts is None:
        report(
            Problem(
                "none of the model files is a diffusion transformer of a known family",
                f"known: {', '.join(FAMILIES)}",
                wrong_use=True,
            )
        )
    return facts


def family_named(entries: Iterable[str]) -> FamilyFacts | None:
    """Return the family of the first repository with a known name."""
    names = (parts[0] for parts in map(split_entry, entries) if parts)
    return next(filter(None, map(family_of_model, names)), None)


def refused_models(entries: Iterable[str]) -> list[Problem]:
    """Return a problem for each known model that is not supported."""
    found: dict[str, str] = {}
    for entry in entries:
        if what := not_trained(entry):
            found.setdefault(what, entry)
    hint = "`diffsynth recipe list` shows what is supported"
    return [
        Problem(f"`{entry}` belongs to {what}, which is not supported yet", hint, wrong_use=True)
        for what, entry in found.items()
    ]


def assign_files(
    parts: Sequence[FoundPart],
    facts: FamilyFacts,
    parameters: Parameters,
) -> AssignedFiles:
    """Assign files to components by their tensors; names only show what the user intended."""
    assigned = AssignedFiles({}, {}, set())
    components = assigned.components
    taken: dict[str, FileSet] = {}
    for stored in parts:
        file_set, tensors = stored.file_set, stored.names
        found = recognize(tensors, facts)
        if found is None:
            unsupported, other = find_unsupported(tensors, facts), recognize_family(tensors)
            report(_unrecognized(stored, facts, unsupported, other))
            expected = _expected(file_set, facts) or (facts.denoiser if other else None)
            assigned.reported.update(name for name in (unsupported.component if unsupported else expected,) if name)
            continue
        component, layout = found
        if component.name in taken:
            report(_twice(component, (taken[component.name], file_set), facts, assigned.reported))
            continue
        taken[component.name] = file_set
        config = config_beside(stored.part.paths[0], component, facts) if stored.alone else None
        folders = (file_set.paths[0].parent, *([file_set.home] if file_set.home else []))
        settings = {name: getattr(parameters, name) for name in component.settings if parameters.given(name)}
        components[component.name] = ComponentFiles(
            component=component.name,
            origin=file_set.source,
            paths=file_set.paths,
            config_path=config,
            layout=layout,
            folders=folders,
            settings=settings,
            storage=storage_of(file_set.entries, parameters),
            prefix=stored.part.prefix,
        )
        assigned.shapes[component.name] = shapes_in(stored.part, layout)
    return assigned


def _twice(component: ComponentFacts, both: tuple[FileSet, FileSet], facts: FamilyFacts, reported: set[str]) -> Problem:
    """Return the problem of two file sets for one component; if one is named like another component, that is the
    mistake.
    """
    for file_set in both:
        expected = _expected(file_set, facts)
        if expected and expected != component.name:
            reported.add(expected)
            return Problem(
                f"`{file_set.origin}` holds the {component.name} of {facts.title}, not its {expected}",
                f"put the {expected} ({facts.component(expected).title}) there, or pass its files",
                wrong_use=True,
            )
    first, second = both
    named = (
        f"`{first.origin}` appears twice as"
        if first.origin == second.origin
        else f"`{second.origin}` and `{first.origin}` are both"
    )
    return Problem(
        f"{named} the {component.name} of {facts.title}",
        "pass only one of them",
        wrong_use=True,
    )


def _expected(file_set: FileSet, facts: FamilyFacts) -> str | None:
    """Return the component that a path in a repository usually belongs to."""
    parts = split_entry(file_set.origin)
    component = component_at(parts[1], facts, parts[0]) if parts else None
    return component.name if component else None


def _unrecognized(
    found: FoundPart, facts: FamilyFacts, unsupported: UnsupportedCheckpoint | None, other: FamilyFacts | None
) -> Problem:
    """Return the problem of files without a component; names unsupported checkpoints and other families'
    transformers.
    """
    name = f"`{found.file_set.origin}`" + (f" below `{found.part.prefix}`" if found.part.prefix else "")
    if unsupported:
        what = f"is {unsupported.title}, not a component of {facts.title}"
    elif other:
        what = f"is the transformer of {other.title}, not a component of {facts.title}"
    else:
        what = f"is not a component of {facts.title}; its first key is `{next(iter(found.names), '')}`"
    known = ", ".join(component.name for component in facts.components)
    return Problem(f"{name} {what}", f"pass files of its components: {known}", wrong_use=True)

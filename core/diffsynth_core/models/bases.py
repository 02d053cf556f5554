"""Reading base files: the component and family of each of their parts. No torch."""

from collections.abc import Collection

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.registry import FAMILIES, recognise
from diffsynth_core.models.spec import ComponentFacts, ComponentFiles, FamilyFacts, Layout
from diffsynth_core.weights.base_files import Part, read_parts
from diffsynth_core.weights.headers import shapes_of

Recognised = tuple[FamilyFacts, ComponentFacts, Layout]
"""Family, component and layout of tensor names."""


def recognise_component(names: Collection[str], family: FamilyFacts | None = None) -> Recognised | None:
    """Return family, component and layout of tensor names; a diffusion transformer takes precedence."""
    families = [family] if family else FAMILIES.values()
    found = [(facts, *known) for facts in families if (known := recognise(names, facts))]
    found.sort(key=lambda item: item[2].borrowed)
    denoisers = [item for item in found if item[1].name == item[0].denoiser]
    return next(iter(denoisers or found), None)


def part_of(files: ComponentFiles) -> Part:
    """Return the part of a component's files that belongs to the component.

    Raises:
        DiffSynthError: see `read_parts`; also if the files have changed and no longer contain it.
    """
    parts = {part.prefix: part for part in read_parts(files.paths, files.origin)}
    if files.prefix not in parts:
        raise DiffSynthError(
            f"`{files.origin}` no longer contains {files.component} under `{files.prefix}`", "rerun the command"
        )
    return parts[files.prefix]


def shapes_in(part: Part, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a component's tensors by module key, without tensors that the module lacks."""
    return layout.module_shapes(shapes_of(part.tensors))

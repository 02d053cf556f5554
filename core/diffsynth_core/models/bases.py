"""The one reader of base files: which component of which family each part of them is. No torch."""

from collections.abc import Collection

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.registry import FAMILIES, recognise
from diffsynth_core.models.spec import ComponentFacts, ComponentFiles, FamilyFacts, Layout
from diffsynth_core.weights.base_files import Part, read_parts
from diffsynth_core.weights.headers import shapes_of

Recognised = tuple[FamilyFacts, ComponentFacts, Layout]


def recognise_component(names: Collection[str], family: FamilyFacts | None = None) -> Recognised | None:
    """The family, component and layout of these tensor names; a diffusion transformer before all others."""
    families = [family] if family else FAMILIES.values()
    found = [(facts, *known) for facts in families if (known := recognise(names, facts))]
    found.sort(key=lambda item: item[2].borrowed)
    denoisers = [item for item in found if item[1].name == item[0].denoiser]
    return next(iter(denoisers or found), None)


def part_of(files: ComponentFiles) -> Part:
    """What the files of a component hold of it.

    Raises:
        DiffSynthError: as `read_parts`, and when it is not in them any more.
    """
    parts = {part.prefix: part for part in read_parts(files.paths, files.origin)}
    if files.prefix not in parts:
        raise DiffSynthError(
            f"`{files.origin}` no longer contains {files.component} under `{files.prefix}`", "rerun the command"
        )
    return parts[files.prefix]


def shapes_in(part: Part, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Shapes of a component's tensors by the names of our module; what has no place in it is left out."""
    return layout.module_shapes(shapes_of(part.tensors))

"""The weights of a component in its files. No torch."""

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.spec import ComponentFiles, Layout
from diffsynth_core.weights.base_files import Part, read_parts
from diffsynth_core.weights.headers import shapes_of


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

"""Conversion of a component's full weights from one layout to another, as byte ranges in files. No torch."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from diffsynth_core.conversion.row_spans import RowSpans
from diffsynth_core.models.recognition import has_place, layout_of, readings
from diffsynth_core.models.spec import ComponentFacts, Layout
from diffsynth_core.weights.dtypes import BITS_PER_ELEMENT
from diffsynth_core.weights.key_maps import KeyMap


@dataclass(frozen=True)
class Translated:
    """Tensors under their new names.

    Attributes:
        unknown: names that the layout does not know, or of which a part is missing for a tensor of the new layout.
        misshapen: names of tensors that cannot be split or fused as the layouts require.
        unneeded: names of aliases of other tensors, which the new layout lacks.
    """

    tensors: Mapping[str, RowSpans]
    unknown: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    unneeded: tuple[str, ...] = ()


def find_reading(component: ComponentFacts, names: Collection[str]) -> tuple[KeyMap, Layout]:
    """Return the key map from the names of a component in a checkpoint to module keys, and the layout of the names.

    For a complete component its signature decides; for a part the map with targets for most names.
    """
    layout = layout_of(component, names)
    if layout:
        return layout.names, layout

    def count(reading: tuple[KeyMap, Layout]) -> int:
        return sum(has_place(reading[0], reading[1], name) for name in names)

    return max(readings(component), key=count)


def translate(tensors: Mapping[str, RowSpans], reading: KeyMap, writing: KeyMap) -> Translated:
    """Convert tensors from the names of `reading` to those of `writing`, both of which map to module keys."""
    own: dict[str, RowSpans] = {}
    source: dict[str, str] = {}
    unknown, misshapen, unneeded = [], [], []
    for name, tensor in tensors.items():
        parts = reading.to_targets(name)
        if parts is None:
            unknown.append(name)
        elif not parts:
            unneeded.append(name)
        elif not _can_cut(reading, name, tensor) or any(part in own for part in parts):
            misshapen.append(name)
        else:
            own |= reading.split(name, tensor)
            source |= dict.fromkeys(parts, name)
    written = {}
    for name in writing.to_sources(own):
        parts = writing.to_targets(name) or ()
        if all(own[part].shape for part in parts) or len(parts) == 1:
            written[name] = writing.fuse(name, own)
        if name not in written or not _is_whole(written[name]):
            misshapen += [source[part] for part in parts]
    placed = {part for name in written for part in writing.to_targets(name) or ()}
    unknown += [source[part] for part in own if part not in placed and source[part] not in misshapen]
    return Translated(written, _once(unknown), _once(misshapen), _once(unneeded))


def _can_cut(reading: KeyMap, name: str, tensor: RowSpans) -> bool:
    """Return whether a tensor can be split into rows, and has as many as its parts together."""
    shapes = reading.split_shape(name, tensor.shape)
    return bool(tensor.shape or len(shapes) == 1) and (
        sum(math.prod(shape) for shape in shapes.values()) == math.prod(tensor.shape)
    )


def _is_whole(tensor: RowSpans) -> bool:
    """Return whether a tensor has all the bytes of its shape and dtype."""
    there = sum(span.end - span.begin for span in tensor.spans)
    return there == math.prod(tensor.shape) * BITS_PER_ELEMENT[tensor.dtype] // 8


def _once(names: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))

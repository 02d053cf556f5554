"""Full weights of a component from the names of one layout to those of another, as places in files. No torch."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from diffsynth_core.conversion.key_owners import has_place, layout_of, readings
from diffsynth_core.conversion.row_spans import RowSpans
from diffsynth_core.models.spec import ComponentFacts, Layout
from diffsynth_core.weights.dtypes import BITS_PER_ELEMENT
from diffsynth_core.weights.key_maps import KeyMap


@dataclass(frozen=True)
class Translated:
    """Tensors under their new names.

    `unknown`: names that the layout does not know, or of which not all is there that a tensor of the new layout needs.
    `misshapen`: names of tensors that cannot be cut or put together as the layouts do it.
    `unneeded`: names of tensors that are another name of one that is there, and have no place in the new layout.
    """

    tensors: Mapping[str, RowSpans]
    unknown: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    unneeded: tuple[str, ...] = ()


def find_reading(component: ComponentFacts, names: Collection[str]) -> tuple[KeyMap, Layout]:
    """The names in which a checkpoint holds a component -> those in our module, and the layout that tells the others.

    Where the whole component is there, its signature tells. Of parts the map that has a place for most names is taken.
    """
    layout = layout_of(component, names)
    if layout:
        return layout.names, layout

    def count(reading: tuple[KeyMap, Layout]) -> int:
        return sum(has_place(reading[0], reading[1], name) for name in names)

    return max(readings(component), key=count)


def translate(tensors: Mapping[str, RowSpans], reading: KeyMap, writing: KeyMap) -> Translated:
    """Tensors by the names of `writing`, given those by the names of `reading`; both lead to names in our module."""
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
    """Whether a tensor has rows where it is cut, and as many as its parts have together."""
    shapes = reading.split_shape(name, tensor.shape)
    return bool(tensor.shape or len(shapes) == 1) and (
        sum(math.prod(shape) for shape in shapes.values()) == math.prod(tensor.shape)
    )


def _is_whole(tensor: RowSpans) -> bool:
    """Whether a tensor has all the bytes that its shape and dtype ask for."""
    there = sum(span.end - span.begin for span in tensor.spans)
    return there == math.prod(tensor.shape) * BITS_PER_ELEMENT[tensor.dtype] // 8


def _once(names: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))

"""Maps between two sets of names for the same weights, from one table that is read in both directions. No torch.

Sources are the names of a file layout, or those that users type; targets, as a rule, those of the module in memory. A
source may fuse several targets (q, k, v in one matrix), never the reverse. In a table `{}` matches a number; a table
names modules, and the leaf after them (`weight`, `bias`, `gamma`) stays unchanged. Where the leaves differ (`scale` of
the source, `weight` of the target) a row names the tensors.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

Tensor = Any
"""A `torch.Tensor`; a table of names does not import torch."""
Shape = tuple[int, ...]
"""The shape of a tensor."""
Rows = tuple[tuple[int, int], ...]
"""Rows of a matrix, in order: ranges from the first number up to the second."""

LEAVES = ("weight", "bias", "gamma")
"""Names of tensors in a module."""
ONE_PIXEL = (1, 1)
"""Height and width of the kernel of a pointwise convolution."""


class KeyMap:
    """The identity map, and the base of the maps that translate.

    Args:
        arguments: those of the subclass: maps with equal arguments are equal, and are pickled by them.
    """

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._arguments == other._arguments

    def __hash__(self) -> int:
        return hash(repr(self._arguments))

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self._arguments!r}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    def to_targets(self, name: str) -> tuple[str, ...] | None:
        """The targets of a source name: several if it is fused, () if it is ignored on purpose, None if unknown."""
        return (name,)

    def to_source(self, name: str) -> str | None:
        """The source that contains a target, alone or fused with others; None if unknown."""
        return name

    def to_sources(self, names: Collection[str]) -> list[str]:
        """The sources of target names; those of which a target is missing are left out, as are unknown targets."""
        found = dict.fromkeys(name for own in names if (name := self.to_source(own)) is not None)
        return [name for name in found if all(own in names for own in self.to_targets(name) or ())]

    def row_fractions(self, name: str) -> dict[str, Fraction]:
        """The fraction of the rows of a source that each of its targets has."""
        return dict.fromkeys(self.to_targets(name) or (), Fraction(1))

    def split_rows(self, name: str, rows: int) -> dict[str, Rows]:
        """Which of the `rows` rows of a source belong to each target, in the order of the target."""
        return dict.fromkeys(self.to_targets(name) or (), ((0, rows),))

    def split_shape(self, name: str, shape: Shape) -> dict[str, Shape]:
        """Shapes of the targets, given that of the source; if it cannot be split, shapes that fit no module."""
        return dict.fromkeys(self.to_targets(name) or (), shape)

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The target tensors of a source tensor; views of it where possible."""
        return dict.fromkeys(self.to_targets(name) or (), tensor)

    def fuse_shape(self, name: str, shapes: Mapping[str, Shape]) -> Shape:
        """The inverse of `split_shape`: the shape of a source, given those of all of its targets."""
        (own,) = self.to_targets(name) or ()
        return shapes[own]

    def fuse(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `split`: the source tensor, given all of its targets."""
        (own,) = self.to_targets(name) or ()
        return tensors[own]


SAME_NAMES = KeyMap()
"""The identity map."""


class PrefixMap(KeyMap):
    """Prefixes that differ, as (source, target); the first match wins in each direction. Other names stay unchanged."""

    def __init__(self, *prefixes: tuple[str, str]) -> None:
        super().__init__(*prefixes)
        self._prefixes = prefixes

    def to_targets(self, name: str) -> tuple[str, ...]:
        return (_swap_prefix(name, self._prefixes),)

    def to_source(self, name: str) -> str:
        return _swap_prefix(name, [(target, source) for source, target in self._prefixes])


def _swap_prefix(name: str, prefixes: "tuple[tuple[str, str], ...] | list[tuple[str, str]]") -> str:
    for prefix, replacement in prefixes:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


class TableMap(KeyMap):
    """A table of names.

    Args:
        renamed: source module or tensor -> target.
        fused: source module -> target modules whose tensors are concatenated in it by rows (fused q, k, v), in equal
            parts, or in proportion to their shares if given as (module, share).
        unsqueezed: source tensor -> (target tensor, number of leading dimensions of size one that the source adds).
        ignored: source modules or tensors without a target, on purpose, with all below them.
        swap_halves: source module -> target module whose upper and lower half of the rows are exchanged (shift and
            scale in the other order).
        pointwise: source convolution with a kernel of one pixel -> target linear layer.
    """

    def __init__(
        self,
        renamed: Mapping[str, str],
        fused: Mapping[str, tuple[str | tuple[str, int], ...]] | None = None,
        unsqueezed: Mapping[str, tuple[str, int]] | None = None,
        ignored: tuple[str, ...] = (),
        swap_halves: Mapping[str, str] | None = None,
        pointwise: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(renamed, fused, unsqueezed, ignored, swap_halves, pointwise)
        one_to_one = {**renamed, **(swap_halves or {}), **(pointwise or {})}
        rules: dict[str, tuple[str, ...]] = {source: (target,) for source, target in one_to_one.items()}
        self._shares: dict[str, tuple[int, ...]] = {}
        for source, parts in (fused or {}).items():
            shared = [(part, 1) if isinstance(part, str) else part for part in parts]
            rules[source] = tuple(name for name, _ in shared)
            self._shares[source] = tuple(share for _, share in shared)
        rules |= {source: (target,) for source, (target, _) in (unsqueezed or {}).items()}
        self.rules: Mapping[str, tuple[str, ...]] = rules
        self._leading = {source: count for source, (_, count) in (unsqueezed or {}).items()}
        self._ignored = ignored
        self._swapped_rules = frozenset(swap_halves or ())
        self._pointwise = frozenset(pointwise or ())
        self._source_patterns = [(_pattern(source), source) for source in rules]
        self._target_patterns = [(_pattern(target), source) for source, targets in rules.items() for target in targets]
        # A lookup tries every pattern, and models with thousands of tensors are looked up many times.
        self.to_targets = lru_cache(maxsize=None)(self._to_targets)  # type: ignore[method-assign]
        self.to_source = lru_cache(maxsize=None)(self._to_source)  # type: ignore[method-assign]

    def rule(self, name: str) -> str | None:
        """The row of the table that translates a source name."""
        found = _find(name, self._source_patterns)
        return found[0] if found else None

    def _to_targets(self, name: str) -> tuple[str, ...] | None:
        found = _find(name, self._source_patterns)
        if found is None:
            return () if any(name == part or name.startswith(f"{part}.") for part in self._ignored) else None
        rule, numbers, leaf = found
        return tuple(target.format(*numbers) + leaf for target in self.rules[rule])

    def _to_source(self, name: str) -> str | None:
        found = _find(name, self._target_patterns)
        if found is None:
            return None
        rule, numbers, leaf = found
        return rule.format(*numbers) + leaf

    def row_fractions(self, name: str) -> dict[str, Fraction]:
        names = self.to_targets(name) or ()
        shares = self._shares.get(self.rule(name) or "", (1,) * len(names))
        return {own: Fraction(share, sum(shares)) for own, share in zip(names, shares, strict=True)}

    def split_rows(self, name: str, rows: int) -> dict[str, Rows]:
        names, rule = self.to_targets(name) or (), self.rule(name) or ""
        if rule in self._swapped_rules:  # the same rows as `_swap_halves`
            return dict.fromkeys(names, ((rows - rows // 2, rows), (0, rows - rows // 2)))
        found: dict[str, Rows] = {}
        begin = 0
        for own, count in zip(names, _rows(self._shares.get(rule, (1,) * len(names)), rows), strict=True):
            found[own] = ((begin, begin + count),)
            begin += count
        return found

    def split_shape(self, name: str, shape: Shape) -> dict[str, Shape]:
        names, rule = self.to_targets(name) or (), self.rule(name) or ""
        if rule in self._shares and shape:
            rows = _rows(self._shares[rule], shape[0])
            return {own: (count, *shape[1:]) for own, count in zip(names, rows, strict=True)}
        if rule in self._pointwise:
            return dict.fromkeys(names, shape[:2] if shape[2:] == ONE_PIXEL else shape)
        leading = self._leading.get(rule, 0)
        return dict.fromkeys(names, shape[leading:] if shape[:leading] == (1,) * leading else shape)

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        names, rule = self.to_targets(name) or (), self.rule(name) or ""
        if rule in self._shares:
            return dict(zip(names, tensor.split(_rows(self._shares[rule], len(tensor))), strict=True))
        if rule in self._swapped_rules:
            return dict.fromkeys(names, _swap_halves(tensor))
        return {own: tensor.reshape(shape) for own, shape in self.split_shape(name, tuple(tensor.shape)).items()}

    def fuse_shape(self, name: str, shapes: Mapping[str, Shape]) -> Shape:
        parts, rule = [shapes[own] for own in self.to_targets(name) or ()], self.rule(name) or ""
        if rule in self._shares and all(parts):
            return (sum(part[0] for part in parts), *parts[0][1:])
        if rule in self._pointwise and len(parts[0]) == 2:
            return (*parts[0], *ONE_PIXEL)
        return (1,) * self._leading.get(rule, 0) + parts[0]

    def fuse(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        names, rule = self.to_targets(name) or (), self.rule(name) or ""
        parts = [tensors[own] for own in names]
        if rule in self._shares:
            # No `torch.cat`: `RowSpans` (conversion/row_spans.py) plans fused files with these verbs, without torch.
            whole = parts[0].new_empty(self.fuse_shape(name, {own: tensors[own].shape for own in names}))
            rows = 0
            for part in parts:
                whole[rows : rows + len(part)] = part
                rows += len(part)
            return whole
        if rule in self._swapped_rules:
            return _swap_halves(parts[0])
        if rule in self._leading or rule in self._pointwise:
            return parts[0].reshape(self.fuse_shape(name, {own: tuple(tensors[own].shape) for own in names}))
        return parts[0]


class ComposedKeyMap(KeyMap):
    """Two maps in sequence: source -> intermediate names -> target."""

    def __init__(self, first: KeyMap, second: KeyMap) -> None:
        super().__init__(first, second)
        self._first, self._second = first, second

    def to_targets(self, name: str) -> tuple[str, ...] | None:
        between = self._first.to_targets(name)
        parts = [self._second.to_targets(part) for part in between or ()]
        if between is None or None in parts:
            return None
        return tuple(own for part in parts for own in part or ())

    def to_source(self, name: str) -> str | None:
        between = self._second.to_source(name)
        return None if between is None else self._first.to_source(between)

    def row_fractions(self, name: str) -> dict[str, Fraction]:
        return {
            own: share * part
            for between, share in self._first.row_fractions(name).items()
            for own, part in self._second.row_fractions(between).items()
        }

    def split_rows(self, name: str, rows: int) -> dict[str, Rows]:
        found: dict[str, Rows] = {}
        for between, outer in self._first.split_rows(name, rows).items():
            for own, inner in self._second.split_rows(between, count_rows(outer)).items():
                found[own] = tuple(span for begin, end in inner for span in take_rows(outer, begin, end))
        return found

    def split_shape(self, name: str, shape: Shape) -> dict[str, Shape]:
        between = self._first.split_shape(name, shape)
        return {own: value for part in between for own, value in self._second.split_shape(part, between[part]).items()}

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        between = self._first.split(name, tensor)
        return {own: value for part in between for own, value in self._second.split(part, between[part]).items()}

    def fuse_shape(self, name: str, shapes: Mapping[str, Shape]) -> Shape:
        parts = self._first.to_targets(name) or ()
        return self._first.fuse_shape(name, {part: self._second.fuse_shape(part, shapes) for part in parts})

    def fuse(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        parts = self._first.to_targets(name) or ()
        return self._first.fuse(name, {part: self._second.fuse(part, tensors) for part in parts})


def count_rows(rows: Rows) -> int:
    """Return the number of rows."""
    return sum(end - begin for begin, end in rows)


def take_rows(rows: Rows, begin: int, end: int) -> Rows:
    """Return the rows from position `begin` to `end` (exclusive), counted in their order."""
    taken, place = [], 0
    for first, last in rows:
        low, high = max(begin, place), min(end, place + last - first)
        if low < high:
            taken.append((first + low - place, first + high - place))
        place += last - first
    return tuple(taken)


def _rows(shares: Sequence[int], rows: int) -> list[int]:
    """Return the rows of each part; a remainder goes to the last part, whose shape then fits no module."""
    unit = rows // sum(shares)
    first = [share * unit for share in shares[:-1]]
    return [*first, rows - sum(first)]


def _swap_halves(tensor: Tensor) -> Tensor:
    """Exchange the upper and lower half of the rows; its own inverse."""
    return tensor.roll(len(tensor) // 2, 0)


def _pattern(row: str) -> re.Pattern[str]:
    """A row of a table, or a tensor of it: the numbers, then the leaf."""
    return re.compile(re.escape(row).replace(r"\{\}", r"(\d+)") + rf"(\.(?:{'|'.join(LEAVES)}))?")


def _find(name: str, patterns: list[tuple[re.Pattern[str], str]]) -> tuple[str, tuple[str, ...], str] | None:
    """(row, numbers, leaf) of the first row that a name fits."""
    for pattern, rule in patterns:
        match = pattern.fullmatch(name)
        if match:
            *numbers, leaf = match.groups()
            return rule, tuple(numbers), leaf or ""
    return None

"""Two ways of naming the same weights, from one literal table that is read in both directions. No torch.

`theirs` are the names of a file layout or the names a user types; `ours` those of the module in memory. In a table `{}`
stands for a number; a table names modules, and the leaf behind them (`weight`, `bias`, `gamma`) stays as it is. Where
the leaves differ (`scale` of theirs, `weight` of ours) a row names the tensors.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

Tensor = Any
"""A `torch.Tensor`; a table of names does not import torch."""
Shape = tuple[int, ...]
Rows = tuple[tuple[int, int], ...]
"""Rows of a matrix in an order: from each first number up to the second."""

LEAVES = ("weight", "bias", "gamma")
ONE_PIXEL = (1, 1)
"""Height and width of the kernel of a convolution that looks at one pixel."""


class KeyMap:
    """Names that are the same on both sides; the base of the maps that translate.

    Args:
        arguments: what the map is made of: maps of equal arguments are equal, and are pickled by them.
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

    def ours(self, name: str) -> tuple[str, ...] | None:
        """The names in our module of what `theirs` calls `name`.

        Several when it holds several of our tensors one under the other, none when nobody needs it, None when unknown.
        """
        return (name,)

    def theirs(self, name: str) -> str | None:
        """The inverse of `ours`; tensors that stand one under the other share their name. None when unknown."""
        return name

    def theirs_of(self, names: Collection[str]) -> list[str]:
        """What `theirs` calls our `names`; what is not there whole, or has no name there, is left out."""
        found = dict.fromkeys(name for own in names if (name := self.theirs(own)) is not None)
        return [name for name in found if all(own in names for own in self.ours(name) or ())]

    def shares(self, name: str) -> dict[str, Fraction]:
        """How much of the rows of `theirs` each of our tensors has."""
        return dict.fromkeys(self.ours(name) or (), Fraction(1))

    def cut_rows(self, name: str, rows: int) -> dict[str, Rows]:
        """Which of the rows of `theirs`, `rows` in all, are those of each of our tensors, in the order of ours."""
        return dict.fromkeys(self.ours(name) or (), ((0, rows),))

    def cut_shape(self, name: str, shape: Shape) -> dict[str, Shape]:
        """Shapes of our tensors, given that of `theirs`; of one that cannot be cut, shapes that fit no module."""
        return dict.fromkeys(self.ours(name) or (), shape)

    def cut(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Our tensors, given `theirs`; views of it where they can be."""
        return dict.fromkeys(self.ours(name) or (), tensor)

    def join_shape(self, name: str, shapes: Mapping[str, Shape]) -> Shape:
        """The inverse of `cut_shape`: the shape of `theirs`, given those of all of our tensors."""
        (own,) = self.ours(name) or ()
        return shapes[own]

    def join(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `cut`: `theirs`, given all of our tensors."""
        (own,) = self.ours(name) or ()
        return tensors[own]


SAME_NAMES = KeyMap()


class PrefixMap(KeyMap):
    """Prefixes that differ, as (theirs, ours), first match wins in each direction; other names stay."""

    def __init__(self, *prefixes: tuple[str, str]) -> None:
        super().__init__(*prefixes)
        self._prefixes = prefixes

    def ours(self, name: str) -> tuple[str, ...]:
        return (_swap_prefix(name, self._prefixes),)

    def theirs(self, name: str) -> str:
        return _swap_prefix(name, [(ours, theirs) for theirs, ours in self._prefixes])


def _swap_prefix(name: str, prefixes: "tuple[tuple[str, str], ...] | list[tuple[str, str]]") -> str:
    for prefix, replacement in prefixes:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


class TableMap(KeyMap):
    """A table of names.

    Args:
        renamed: module or tensor of theirs -> of ours.
        stacked: module of theirs -> modules of ours, whose tensors stand one under the other in it (fused q, k, v):
            each has as many rows, or as many as its share says where it is given as (module, share).
        unsqueezed: tensor of theirs -> (tensor of ours, how many leading dimensions of one theirs has before it).
        unneeded: modules or tensors of theirs that we have no place for, on purpose; all below them too.
        swapped: module of theirs -> module of ours, whose tensors have the upper and the lower half of the rows
            exchanged (shift and scale in the other order).
        pointwise: convolution of theirs whose kernel is one pixel -> linear layer of ours.
    """

    def __init__(
        self,
        renamed: Mapping[str, str],
        stacked: Mapping[str, tuple[str | tuple[str, int], ...]] | None = None,
        unsqueezed: Mapping[str, tuple[str, int]] | None = None,
        unneeded: tuple[str, ...] = (),
        swapped: Mapping[str, str] | None = None,
        pointwise: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(renamed, stacked, unsqueezed, unneeded, swapped, pointwise)
        one_to_one = {**renamed, **(swapped or {}), **(pointwise or {})}
        rules: dict[str, tuple[str, ...]] = {theirs: (ours,) for theirs, ours in one_to_one.items()}
        self._shares: dict[str, tuple[int, ...]] = {}
        for theirs, parts in (stacked or {}).items():
            shared = [(part, 1) if isinstance(part, str) else part for part in parts]
            rules[theirs] = tuple(name for name, _ in shared)
            self._shares[theirs] = tuple(share for _, share in shared)
        rules |= {theirs: (ours,) for theirs, (ours, _) in (unsqueezed or {}).items()}
        self.rules: Mapping[str, tuple[str, ...]] = rules
        self._leading = {theirs: count for theirs, (_, count) in (unsqueezed or {}).items()}
        self._unneeded = unneeded
        self._swapped = frozenset(swapped or ())
        self._pointwise = frozenset(pointwise or ())
        self._from_theirs = [(_pattern(theirs), theirs) for theirs in rules]
        self._from_ours = [(_pattern(name), theirs) for theirs, ours in rules.items() for name in ours]
        self.ours = lru_cache(maxsize=None)(self._ours)  # type: ignore[method-assign]
        self.theirs = lru_cache(maxsize=None)(self._theirs)  # type: ignore[method-assign]

    def rule(self, name: str) -> str | None:
        """The row of the table that translates `name` of theirs."""
        found = _find(name, self._from_theirs)
        return found[0] if found else None

    def _ours(self, name: str) -> tuple[str, ...] | None:
        found = _find(name, self._from_theirs)
        if found is None:
            return () if any(name == part or name.startswith(f"{part}.") for part in self._unneeded) else None
        rule, numbers, leaf = found
        return tuple(ours.format(*numbers) + leaf for ours in self.rules[rule])

    def _theirs(self, name: str) -> str | None:
        found = _find(name, self._from_ours)
        if found is None:
            return None
        rule, numbers, leaf = found
        return rule.format(*numbers) + leaf

    def shares(self, name: str) -> dict[str, Fraction]:
        names = self.ours(name) or ()
        shares = self._shares.get(self.rule(name) or "", (1,) * len(names))
        return {own: Fraction(share, sum(shares)) for own, share in zip(names, shares, strict=True)}

    def cut_rows(self, name: str, rows: int) -> dict[str, Rows]:
        names, rule = self.ours(name) or (), self.rule(name) or ""
        if rule in self._swapped:
            return dict.fromkeys(names, ((rows - rows // 2, rows), (0, rows - rows // 2)))
        found: dict[str, Rows] = {}
        begin = 0
        for own, count in zip(names, _rows(self._shares.get(rule, (1,) * len(names)), rows), strict=True):
            found[own] = ((begin, begin + count),)
            begin += count
        return found

    def cut_shape(self, name: str, shape: Shape) -> dict[str, Shape]:
        names, rule = self.ours(name) or (), self.rule(name) or ""
        if rule in self._shares and shape:
            rows = _rows(self._shares[rule], shape[0])
            return {own: (count, *shape[1:]) for own, count in zip(names, rows, strict=True)}
        if rule in self._pointwise:
            return dict.fromkeys(names, shape[:2] if shape[2:] == ONE_PIXEL else shape)
        leading = self._leading.get(rule, 0)
        return dict.fromkeys(names, shape[leading:] if shape[:leading] == (1,) * leading else shape)

    def cut(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        names, rule = self.ours(name) or (), self.rule(name) or ""
        if rule in self._shares:
            return dict(zip(names, tensor.split(_rows(self._shares[rule], len(tensor))), strict=True))
        if rule in self._swapped:
            return dict.fromkeys(names, _swap_halves(tensor))
        return {own: tensor.reshape(shape) for own, shape in self.cut_shape(name, tuple(tensor.shape)).items()}

    def join_shape(self, name: str, shapes: Mapping[str, Shape]) -> Shape:
        parts, rule = [shapes[own] for own in self.ours(name) or ()], self.rule(name) or ""
        if rule in self._shares and all(parts):
            return (sum(part[0] for part in parts), *parts[0][1:])
        if rule in self._pointwise and len(parts[0]) == 2:
            return (*parts[0], *ONE_PIXEL)
        return (1,) * self._leading.get(rule, 0) + parts[0]

    def join(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        names, rule = self.ours(name) or (), self.rule(name) or ""
        parts = [tensors[own] for own in names]
        if rule in self._shares:
            whole = parts[0].new_empty(self.join_shape(name, {own: tensors[own].shape for own in names}))
            rows = 0
            for part in parts:
                whole[rows : rows + len(part)] = part
                rows += len(part)
            return whole
        if rule in self._swapped:
            return _swap_halves(parts[0])
        if rule in self._leading or rule in self._pointwise:
            return parts[0].reshape(self.join_shape(name, {own: tuple(tensors[own].shape) for own in names}))
        return parts[0]


class Chain(KeyMap):
    """Two maps one after the other: theirs -> names between -> ours."""

    def __init__(self, first: KeyMap, second: KeyMap) -> None:
        super().__init__(first, second)
        self._first, self._second = first, second

    def ours(self, name: str) -> tuple[str, ...] | None:
        between = self._first.ours(name)
        parts = [self._second.ours(part) for part in between or ()]
        if between is None or None in parts:
            return None
        return tuple(own for part in parts for own in part or ())

    def theirs(self, name: str) -> str | None:
        between = self._second.theirs(name)
        return None if between is None else self._first.theirs(between)

    def shares(self, name: str) -> dict[str, Fraction]:
        return {
            own: share * part
            for between, share in self._first.shares(name).items()
            for own, part in self._second.shares(between).items()
        }

    def cut_rows(self, name: str, rows: int) -> dict[str, Rows]:
        found: dict[str, Rows] = {}
        for between, outer in self._first.cut_rows(name, rows).items():
            for own, inner in self._second.cut_rows(between, count_rows(outer)).items():
                found[own] = tuple(span for begin, end in inner for span in take_rows(outer, begin, end))
        return found

    def cut_shape(self, name: str, shape: Shape) -> dict[str, Shape]:
        between = self._first.cut_shape(name, shape)
        return {own: cut for part in between for own, cut in self._second.cut_shape(part, between[part]).items()}

    def cut(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        between = self._first.cut(name, tensor)
        return {own: cut for part in between for own, cut in self._second.cut(part, between[part]).items()}

    def join_shape(self, name: str, shapes: Mapping[str, Shape]) -> Shape:
        parts = self._first.ours(name) or ()
        return self._first.join_shape(name, {part: self._second.join_shape(part, shapes) for part in parts})

    def join(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        parts = self._first.ours(name) or ()
        return self._first.join(name, {part: self._second.join(part, tensors) for part in parts})


def count_rows(rows: Rows) -> int:
    """How many rows there are."""
    return sum(end - begin for begin, end in rows)


def take_rows(rows: Rows, begin: int, end: int) -> Rows:
    """Of these rows those from the place `begin` up to `end`, counted in their order."""
    taken, place = [], 0
    for first, last in rows:
        low, high = max(begin, place), min(end, place + last - first)
        if low < high:
            taken.append((first + low - place, first + high - place))
        place += last - first
    return tuple(taken)


def _rows(shares: Sequence[int], rows: int) -> list[int]:
    """Rows of each part; what the shares do not divide falls to the last, which then fits none beside the others."""
    unit = rows // sum(shares)
    first = [share * unit for share in shares[:-1]]
    return [*first, rows - sum(first)]


def _swap_halves(tensor: Tensor) -> Tensor:
    """The lower half of the rows above the upper one; its own inverse."""
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

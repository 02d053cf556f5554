"""Two ways of naming the same weights, from one literal table that is read in both directions. No torch.

`theirs` are the names of a file layout or the names a user types; `ours` those of the module in memory. In a table `{}`
stands for a number; a table names modules, and the leaf behind them (`weight`, `bias`, `gamma`) stays as it is.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

Tensor = Any
"""A `torch.Tensor`; a table of names does not import torch."""
Shape = tuple[int, ...]

LEAVES = ("weight", "bias", "gamma")


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

    def cut_shape(self, name: str, shape: Shape) -> dict[str, Shape]:
        """Shapes of our tensors, given that of `theirs`."""
        return dict.fromkeys(self.ours(name) or (), shape)

    def cut(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Our tensors, given `theirs`; views of it."""
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
        stacked: module of theirs -> modules of ours, whose tensors stand one under the other in it (fused q, k, v).
        unsqueezed: tensor of theirs -> (tensor of ours, how many leading dimensions of one theirs has before it).
        unneeded: modules or tensors of theirs that we have no place for, on purpose; all below them too.
    """

    def __init__(
        self,
        renamed: Mapping[str, str],
        stacked: Mapping[str, tuple[str, ...]] | None = None,
        unsqueezed: Mapping[str, tuple[str, int]] | None = None,
        unneeded: tuple[str, ...] = (),
    ) -> None:
        super().__init__(renamed, stacked, unsqueezed, unneeded)
        rules: dict[str, tuple[str, ...]] = {theirs: (ours,) for theirs, ours in renamed.items()}
        rules |= dict(stacked or {})
        rules |= {theirs: (ours,) for theirs, (ours, _) in (unsqueezed or {}).items()}
        self.rules: Mapping[str, tuple[str, ...]] = rules
        self._leading = {theirs: count for theirs, (_, count) in (unsqueezed or {}).items()}
        self._unneeded = unneeded
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

    def cut_shape(self, name: str, shape: Shape) -> dict[str, Shape]:
        names = self.ours(name) or ()
        if len(names) > 1:
            return dict.fromkeys(names, (shape[0] // len(names), *shape[1:]))
        return dict.fromkeys(names, shape[self._leading.get(self.rule(name) or "", 0) :])

    def cut(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        names = self.ours(name) or ()
        if len(names) > 1:
            return dict(zip(names, tensor.chunk(len(names)), strict=True))
        leading = self._leading.get(self.rule(name) or "", 0)
        return dict.fromkeys(names, tensor.reshape(tensor.shape[leading:]))

    def join_shape(self, name: str, shapes: Mapping[str, Shape]) -> Shape:
        parts = [shapes[own] for own in self.ours(name) or ()]
        if len(parts) > 1:
            return (sum(part[0] for part in parts), *parts[0][1:])
        return (1,) * self._leading.get(self.rule(name) or "", 0) + parts[0]

    def join(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        parts = [tensors[own] for own in self.ours(name) or ()]
        if len(parts) > 1:
            whole = parts[0].new_empty(
                self.join_shape(name, {own: tensors[own].shape for own in self.ours(name) or ()})
            )
            rows = 0
            for part in parts:
                whole[rows : rows + len(part)] = part
                rows += len(part)
            return whole
        return parts[0][(None,) * self._leading.get(self.rule(name) or "", 0)]


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

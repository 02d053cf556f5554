"""LoRA between modules and their parts, by the rows of B. No torch.

(B A) of a fused module is that of its parts one under the other. A part of a fused module takes its rows of B and all
of A. A fused module takes the rows of B of its parts: with one A where all have the same, else with the A of each below
that of the one before, and B block-diagonal, so that ranks add.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Generic, TypeVar

from diffsynth_core.errors import DiffSynthError, list_names
from diffsynth_core.weights.key_maps import KeyMap, count_rows
from diffsynth_core.weights.lora_names import Vocabulary
from diffsynth_core.weights.values import read_bytes
from diffsynth_core.weights.weight_sets import Span


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file; `dtype` in safetensors' words."""

    dtype: str
    shape: tuple[int, ...]
    span: Span
    key: str = ""


@dataclass(frozen=True)
class StoredLora:
    """One LoRA of a file: A `[rank, in, …]`, B `[out, rank, …]`, and its alpha where one is stored.

    `module`: as the file's dialect calls it. `alpha_origin`: where the alpha stands, in words.
    """

    module: str
    down: StoredTensor
    up: StoredTensor
    alpha: float | None = None
    alpha_origin: str = ""

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def rows(self) -> int:
        """Of the weight that it changes."""
        return self.up.shape[0]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one of these rows."""
        return self.down.shape[1:]

    @property
    def path(self) -> Path:
        """The file."""
        return self.up.span.path


@dataclass(frozen=True)
class StoredDifference:
    """What a file adds to a tensor as a whole. `module`: the tensor, as the file's dialect calls it."""

    module: str
    tensor: StoredTensor

    @property
    def rows(self) -> int:
        return self.tensor.shape[0]

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.tensor.shape[1:]

    @property
    def path(self) -> Path:
        return self.tensor.span.path


S = TypeVar("S", StoredLora, StoredDifference)


@dataclass(frozen=True)
class RowSpan(Generic[S]):
    """Rows of B of a stored LoRA (or of a stored difference), from `begin` up to `end`; without one, as many rows of a
    weight that stay as they are."""

    lora: S | None
    begin: int
    end: int


ANOTHER_FAMILY = "pass the right `--family`, or re-export the file"

Rows = tuple[RowSpan[S], ...]
"""What changes a weight, row by row from the first to the last."""
ModuleLora = Rows[StoredLora]


def whole(stored: S) -> Rows[S]:
    """A stored LoRA or difference as it is."""
    return (RowSpan(stored, 0, stored.rows),)


def translate(stored: Mapping[str, S], source: Vocabulary, target: Vocabulary) -> dict[str, Rows[S]]:
    """LoRA (differences) of modules (tensors) by their names in one vocabulary -> by those in another.

    Raises:
        DiffSynthError: when parts of what the other vocabulary has as one do not fit together.
    """
    documented = to_documented(stored, source)
    return _join_all(documented, target.names) if target.fused else _cut_all(documented, target.names)


def to_documented(stored: Mapping[str, S], source: Vocabulary) -> dict[str, Rows[S]]:
    """As `translate`, to the documented names."""
    present = {name: whole(one) for name, one in stored.items()}
    return _cut_all(present, source.names) if source.fused else _join_all(present, source.names)


def loras_of(lora: ModuleLora) -> list[StoredLora]:
    """The stored LoRAs that a module's is made of, each once."""
    return list({id(span.lora): span.lora for span in lora if span.lora}.values())


def group_by_down(loras: Iterable[StoredLora]) -> list[list[StoredLora]]:
    """Those that have the same A, bit for bit, together: they stand in the same columns of B."""
    present = list(loras)
    if len(present) < 2:
        return [present] if present else []
    groups: dict[tuple[object, ...], list[StoredLora]] = {}
    for lora in present:
        groups.setdefault((lora.down.dtype, lora.down.shape, read_bytes(lora.down.span)), []).append(lora)
    return list(groups.values())


def joint_rank(lora: ModuleLora) -> int:
    """The rank of one LoRA that is all of a module's: ranks of those with an A of their own add."""
    return sum(group[0].rank for group in group_by_down(loras_of(lora)))


def _cut_all(loras: Mapping[str, Rows[S]], names: KeyMap) -> dict[str, Rows[S]]:
    """Of modules of theirs -> of ours, apart from parts that nothing changes."""
    found = {}
    for module, lora in loras.items():
        shares = names.row_fractions(module)
        if any((_count(lora) * share).denominator > 1 for share in shares.values()):
            raise DiffSynthError(
                f"{_origin([lora])}: lora_B of `{module}` has {_count(lora)} rows, which cannot be split among "
                f"{list_names(list(shares))}",
                ANOTHER_FAMILY,
            )
        for own, rows in names.split_rows(module, _count(lora)).items():
            part = _merge(span for begin, end in rows for span in _take(lora, begin, end))
            if any(span.lora for span in part):
                found[own] = part
    return found


def _join_all(loras: Mapping[str, Rows[S]], names: KeyMap) -> dict[str, Rows[S]]:
    """Of modules of ours -> of theirs, of which some parts may have none."""
    wholes = dict.fromkeys(filter(None, map(names.to_source, loras)))
    return {
        name: _join(name, {own: loras[own] for own in names.to_targets(name) or () if own in loras}, names)
        for name in wholes
    }


def _join(name: str, parts: Mapping[str, Rows[S]], names: KeyMap) -> Rows[S]:
    """The LoRA of one module of theirs."""
    shares = names.row_fractions(name)
    known, lora = next(iter(parts.items()))
    total = Fraction(_count(lora)) / shares[known]
    rows = names.split_rows(name, int(total))
    sizes = {span.lora.row_shape for part in parts.values() for span in part if span.lora}
    if total.denominator > 1 or len(sizes) > 1 or any(count_rows(rows[own]) != _count(parts[own]) for own in parts):
        raise DiffSynthError(
            f"{_origin(parts.values())}: the LoRAs of {list_names(list(parts))}, which `{name}` fuses, do not "
            f"match: lora_B has {', '.join(str(_count(part)) for part in parts.values())} rows, lora_A "
            f"{', '.join(str(*size[:1]) for size in sorted(sizes))} columns",
            ANOTHER_FAMILY,
        )
    placed: list[tuple[int, RowSpan[S]]] = []
    for own, spans in rows.items():
        part, place = parts.get(own, (RowSpan[S](None, 0, count_rows(spans)),)), 0
        for begin, end in spans:
            row = begin
            for span in _take(part, place, place + end - begin):
                placed.append((row, span))
                row += span.end - span.begin
            place += end - begin
    return _merge(span for _, span in sorted(placed, key=lambda item: item[0]))


def _origin(loras: Iterable[Rows[Any]]) -> str:
    """The files that LoRAs come from."""
    return list_names(sorted({str(span.lora.path) for lora in loras for span in lora if span.lora}))


def _count(lora: Rows[Any]) -> int:
    return sum(span.end - span.begin for span in lora)


def _take(lora: Rows[S], begin: int, end: int) -> list[RowSpan[S]]:
    """The rows from `begin` up to `end` of the module."""
    taken, place = [], 0
    for span in lora:
        low, high = max(begin, place), min(end, place + span.end - span.begin)
        if low < high:
            taken.append(RowSpan(span.lora, span.begin + low - place, span.begin + high - place))
        place += span.end - span.begin
    return taken


def _merge(spans: Iterable[RowSpan[S]]) -> Rows[S]:
    """The same rows in as few spans as possible."""
    merged: list[RowSpan[S]] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last and last.lora is span.lora and (last.end == span.begin or span.lora is None):
            merged[-1] = RowSpan(last.lora, last.begin, last.end + span.end - span.begin)
        else:
            merged.append(span)
    return tuple(merged)

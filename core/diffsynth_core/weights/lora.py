"""The LoRA in a file: for each module A, B and alpha as they are stored, and full differences of tensors. No torch.

Formats split or fuse modules by the rows of B. (B A) of a fused module is that of its parts one below the other. A part
of a fused module takes its rows of B and all of A. A fused module takes the rows of B of its parts: with one A if all
have the same, else with the A of each below that of the one before, and B block-diagonal, so that ranks add up.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Generic, TypeVar

from diffsynth_core.errors import DiffSynthError, list_names
from diffsynth_core.progress import pluralize
from diffsynth_core.weights.key_maps import KeyMap, count_rows
from diffsynth_core.weights.lora_formats import Vocabulary
from diffsynth_core.weights.lora_keys import LoraMatch
from diffsynth_core.weights.values import read_bytes
from diffsynth_core.weights.weight_sets import Span


def lora_scale(alpha: float | None, rank: int, rslora: bool = False) -> float:
    """The factor of B A: alpha / rank (Hu et al. 2021, arXiv:2106.09685), or alpha / sqrt(rank) with rsLoRA
    (Kalajdzievski 2023, arXiv:2312.03732); 1 without an alpha."""
    return 1.0 if alpha is None else alpha / (math.sqrt(rank) if rslora else rank)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file; `dtype` as safetensors names it."""

    dtype: str
    shape: tuple[int, ...]
    span: Span
    key: str = ""


@dataclass(frozen=True)
class LoraPair:
    """The LoRA of one module in a file: A `[rank, in, …]`, B `[out, rank, …]`, and its alpha if one is stated.

    `module`: its name in the file's vocabulary. `alpha_source`: where the alpha is stated, in words.
    """

    module: str
    A: StoredTensor
    B: StoredTensor
    alpha: float | None = None
    alpha_source: str = ""

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.A.shape[0]

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return lora_scale(self.alpha, self.rank)

    @property
    def rows(self) -> int:
        """Those of the weight that it changes."""
        return self.B.shape[0]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one of these rows."""
        return self.A.shape[1:]

    @property
    def path(self) -> Path:
        """The file."""
        return self.B.span.path


@dataclass(frozen=True)
class FullDifference:
    """What a file adds to a whole tensor. `name`: that of the tensor in the file's vocabulary."""

    name: str
    tensor: StoredTensor

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.tensor.shape[0]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row."""
        return self.tensor.shape[1:]

    @property
    def path(self) -> Path:
        """The file."""
        return self.tensor.span.path


S = TypeVar("S", LoraPair, FullDifference)


@dataclass(frozen=True)
class RowSpan(Generic[S]):
    """Rows of B of a LoRA in a file, or of a full difference, from `begin` up to `end`; if `stored` is None, as many
    rows of a weight that do not change."""

    stored: S | None
    begin: int
    end: int


Rows = tuple[RowSpan[S], ...]
"""The change of a weight, from its first to its last row."""
ModuleLora = Rows[LoraPair]
"""The LoRA of one module."""


@dataclass(frozen=True)
class Lora:
    """The LoRA of one component in a file.

    `match`: how its keys were matched. `pairs`: module -> LoRA, and `differences`: tensor -> full difference, as
    stored, by names in the file's vocabulary. `modules` and `tensors`: the same by public name.
    """

    path: Path
    match: LoraMatch
    pairs: Mapping[str, LoraPair]
    differences: Mapping[str, FullDifference]
    modules: Mapping[str, ModuleLora]
    tensors: Mapping[str, Rows[FullDifference]]

    @classmethod
    def of(
        cls,
        path: Path,
        match: LoraMatch,
        pairs: Mapping[str, LoraPair],
        differences: Mapping[str, FullDifference] | None = None,
    ) -> "Lora":
        """The LoRA of a file's tensors.

        Raises:
            DiffSynthError: when parts of a public module do not match.
        """
        differences = differences or {}
        public = to_public(pairs, match.vocabulary), to_public(differences, match.vocabulary)
        return cls(path, match, pairs, differences, *public)

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Keys of the file that belong to no module."""
        return self.match.unmatched

    @property
    def weights(self) -> frozenset[str]:
        """Public names of the tensors that it changes."""
        return frozenset((*(f"{module}.weight" for module in self.modules), *self.tensors))

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of one LoRA for each public module; separate LoRAs of q, k and v have their joint rank."""
        return {module: joint_rank(lora) for module, lora in self.modules.items()}

    @property
    def stored_ranks(self) -> list[int]:
        """The different ranks in the file, in ascending order."""
        return sorted({pair.rank for pair in self.pairs.values()})

    @property
    def scales(self) -> list[float]:
        """The different scales in the file, in ascending order."""
        return sorted({pair.scale for pair in self.pairs.values()})

    @property
    def alpha_source(self) -> str:
        """Where its alphas are stated, in words."""
        sources = [pair.alpha_source for pair in self.pairs.values() if pair.alpha_source]
        stored = sources.count(STORED)
        if stored:
            return (
                STORED if stored == len(self.pairs) else f"stored for {stored} of {len(self.pairs)}, else alpha = rank"
            )
        return ", ".join(sorted({*sources})) or "alpha = rank"

    def in_vocabulary(self, target: Vocabulary) -> dict[str, ModuleLora]:
        """LoRAs by the names of modules in a vocabulary.

        Raises:
            DiffSynthError: when parts of a module that the vocabulary fuses do not match.
        """
        return _from_public(self.modules, target)


STORED = "stored"
"""The `alpha_source` of an alpha that is a tensor of the file."""
ANOTHER_FAMILY = "pass the right `--family`, or re-export the file"
"""Hint for a LoRA that may be of another family."""


def whole(stored: S) -> Rows[S]:
    """A LoRA or difference as it is stored."""
    return (RowSpan(stored, 0, stored.rows),)


def translate(stored: Mapping[str, S], source: Vocabulary, target: Vocabulary) -> dict[str, Rows[S]]:
    """LoRAs of modules, or differences of tensors, by their names in one vocabulary -> by those in another.

    Raises:
        DiffSynthError: when parts of a module that the other vocabulary fuses do not match.
    """
    return _from_public(to_public(stored, source), target)


def to_public(stored: Mapping[str, S], source: Vocabulary) -> dict[str, Rows[S]]:
    """As `translate`, to public names."""
    present = {name: whole(one) for name, one in stored.items()}
    return _split_all(present, source.names) if source.fused else _fuse_all(present, source.names)


def _from_public(public: Mapping[str, Rows[S]], target: Vocabulary) -> dict[str, Rows[S]]:
    return _fuse_all(public, target.names) if target.fused else _split_all(public, target.names)


def pairs_of(lora: ModuleLora) -> list[LoraPair]:
    """The LoRAs in files that a module's consists of, each once."""
    # By identity: LoRAs of two files may be equal and still both count.
    return list({id(span.stored): span.stored for span in lora if span.stored}.values())


def group_by_a(pairs: Iterable[LoraPair]) -> list[list[LoraPair]]:
    """Those with the same A, bit for bit, together: they share columns of B."""
    # Formats that split q, k and v store the A of a fused module several times. Recognized as one, it keeps its rank.
    present = list(pairs)
    if len(present) < 2:
        return [present] if present else []
    groups: dict[tuple[object, ...], list[LoraPair]] = {}
    for pair in present:
        groups.setdefault((pair.A.dtype, pair.A.shape, read_bytes(pair.A.span)), []).append(pair)
    return list(groups.values())


def joint_rank(lora: ModuleLora) -> int:
    """The rank of one LoRA with all of a module's change: ranks of pairs with different A add up."""
    return sum(group[0].rank for group in group_by_a(pairs_of(lora)))


def lora_shapes(lora: ModuleLora) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B of one LoRA with all of a module's change."""
    rank, row_shape = joint_rank(lora), pairs_of(lora)[0].row_shape
    return (rank, *row_shape), (num_rows(lora), rank, *[1] * (len(row_shape) - 1))


def num_rows(lora: Rows[Any]) -> int:
    """The rows of the weight that a LoRA or difference changes."""
    return sum(span.end - span.begin for span in lora)


def _split_all(loras: Mapping[str, Rows[S]], names: KeyMap) -> dict[str, Rows[S]]:
    """From sources to targets, apart from targets that do not change."""
    found = {}
    for module, lora in loras.items():
        fractions = names.row_fractions(module)
        if any((num_rows(lora) * fraction).denominator > 1 for fraction in fractions.values()):
            raise DiffSynthError(
                f"{_origin([lora])}: lora_B of `{module}` has {pluralize(num_rows(lora), 'row')}, which cannot be split among "
                f"{list_names(list(fractions))}",
                ANOTHER_FAMILY,
            )
        for target, rows in names.split_rows(module, num_rows(lora)).items():
            part = _merge(span for begin, end in rows for span in _take(lora, begin, end))
            if any(span.stored for span in part):
                found[target] = part
    return found


def _fuse_all(loras: Mapping[str, Rows[S]], names: KeyMap) -> dict[str, Rows[S]]:
    """From targets to sources, some of whose targets may be missing."""
    wholes = dict.fromkeys(filter(None, map(names.to_source, loras)))
    return {
        name: _fuse(name, {part: loras[part] for part in names.to_targets(name) or () if part in loras}, names)
        for name in wholes
    }


def _fuse(name: str, parts: Mapping[str, Rows[S]], names: KeyMap) -> Rows[S]:
    """The LoRA of one source."""
    fractions = names.row_fractions(name)
    known, lora = next(iter(parts.items()))
    total = Fraction(num_rows(lora)) / fractions[known]
    rows = names.split_rows(name, int(total))
    sizes = {span.stored.row_shape for part in parts.values() for span in part if span.stored}
    if total.denominator > 1 or len(sizes) > 1 or any(count_rows(rows[own]) != num_rows(parts[own]) for own in parts):
        raise DiffSynthError(
            f"{_origin(parts.values())}: the LoRAs of {list_names(list(parts))}, which `{name}` fuses, do not "
            f"match: lora_B has {', '.join(str(num_rows(part)) for part in parts.values())} rows, lora_A "
            f"{', '.join(str(*size[:1]) for size in sorted(sizes))} columns",
            ANOTHER_FAMILY,
        )
    # A target's rows need not be contiguous in the source (swapped halves), so spans are placed by row, then sorted.
    placed: list[tuple[int, RowSpan[S]]] = []
    for target, spans in rows.items():
        part, place = parts.get(target, (RowSpan[S](None, 0, count_rows(spans)),)), 0
        for begin, end in spans:
            row = begin
            for span in _take(part, place, place + end - begin):
                placed.append((row, span))
                row += span.end - span.begin
            place += end - begin
    return _merge(span for _, span in sorted(placed, key=lambda item: item[0]))


def _origin(loras: Iterable[Rows[Any]]) -> str:
    """The files that LoRAs come from."""
    return list_names(sorted({str(span.stored.path) for lora in loras for span in lora if span.stored}))


def _take(lora: Rows[S], begin: int, end: int) -> list[RowSpan[S]]:
    """The rows of a module from `begin` up to `end`."""
    taken, place = [], 0
    for span in lora:
        low, high = max(begin, place), min(end, place + span.end - span.begin)
        if low < high:
            taken.append(RowSpan(span.stored, span.begin + low - place, span.begin + high - place))
        place += span.end - span.begin
    return taken


def _merge(spans: Iterable[RowSpan[S]]) -> Rows[S]:
    """The same rows in as few spans as possible."""
    merged: list[RowSpan[S]] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last and last.stored is span.stored and (last.end == span.begin or span.stored is None):
            merged[-1] = RowSpan(last.stored, last.begin, last.end + span.end - span.begin)
        else:
            merged.append(span)
    return tuple(merged)

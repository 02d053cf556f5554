"""LoRA between modules and their parts, by the rows of B. No torch.

(B A) of a fused module is that of its parts one under the other. A part of a fused module takes its rows of B and all
of A. A fused module takes the rows of B of its parts: with one A where all have the same, else with the A of each below
that of the one before, and B block-diagonal, so that ranks add.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from diffsynth_core.errors import DiffSynthError, shorten
from diffsynth_core.state_dicts.key_maps import KeyMap, count_rows
from diffsynth_core.state_dicts.lora_names import LoraNaming
from diffsynth_core.state_dicts.weight_sets import Span


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file; `dtype` in safetensors' words."""

    dtype: str
    shape: tuple[int, ...]
    span: Span


@dataclass(frozen=True)
class StoredLora:
    """One LoRA of a file: A `[rank, in, …]`, B `[out, rank, …]`, and its alpha where one is stored.

    `module`: as the file's dialect calls it.
    """

    module: str
    down: StoredTensor
    up: StoredTensor
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class RowSpan:
    """Rows of B of a stored LoRA, from `begin` up to `end`; without one, as many rows of a weight that stay as they
    are."""

    lora: StoredLora | None
    begin: int
    end: int


ANOTHER_FAMILY = "give the right `--family`, or write the file anew"

ModuleLora = tuple[RowSpan, ...]
"""What changes a module's weight, row by row from the first to the last."""


def whole(lora: StoredLora) -> ModuleLora:
    """A stored LoRA as it is."""
    return (RowSpan(lora, 0, lora.up.shape[0]),)


def translate(loras: Mapping[str, StoredLora], naming: LoraNaming, source: str, target: str) -> dict[str, ModuleLora]:
    """LoRA of modules by their names in the dialect `source` -> of modules by their names in the dialect `target`.

    Raises:
        DiffSynthError: when parts of what the other dialect has as one do not fit together.
    """
    present = {name: whole(lora) for name, lora in loras.items()}
    if source in naming.fused:
        documented = _cut_all(present, naming.fused[source])
    else:
        documented = _join_all(present, naming.names(source))
    if target in naming.fused:
        return _join_all(documented, naming.fused[target])
    return _cut_all(documented, naming.names(target))


def _cut_all(loras: Mapping[str, ModuleLora], names: KeyMap) -> dict[str, ModuleLora]:
    """Of modules of theirs -> of ours, apart from parts that nothing changes."""
    found = {}
    for module, lora in loras.items():
        shares = names.shares(module)
        if any((_count(lora) * share).denominator > 1 for share in shares.values()):
            raise DiffSynthError(
                f"{_origin([lora])}: lora_B of `{module}` has {_count(lora)} rows, which {shorten(list(shares))} cannot "
                "share",
                ANOTHER_FAMILY,
            )
        for own, rows in names.cut_rows(module, _count(lora)).items():
            part = _merge(span for begin, end in rows for span in _take(lora, begin, end))
            if any(span.lora for span in part):
                found[own] = part
    return found


def _join_all(loras: Mapping[str, ModuleLora], names: KeyMap) -> dict[str, ModuleLora]:
    """Of modules of ours -> of theirs, of which some parts may have none."""
    wholes = dict.fromkeys(filter(None, map(names.theirs, loras)))
    return {
        name: _join(name, {own: loras[own] for own in names.ours(name) or () if own in loras}, names) for name in wholes
    }


def _join(name: str, parts: Mapping[str, ModuleLora], names: KeyMap) -> ModuleLora:
    """The LoRA of one module of theirs."""
    shares = names.shares(name)
    known, lora = next(iter(parts.items()))
    total = Fraction(_count(lora)) / shares[known]
    rows = names.cut_rows(name, int(total))
    sizes = {span.lora.down.shape[1:] for part in parts.values() for span in part if span.lora}
    if total.denominator > 1 or len(sizes) > 1 or any(count_rows(rows[own]) != _count(parts[own]) for own in parts):
        raise DiffSynthError(
            f"{_origin(parts.values())}: the LoRAs of {shorten(list(parts))}, which `{name}` is together, do "
            f"not fit each other: lora_B has {', '.join(str(_count(part)) for part in parts.values())} rows, lora_A "
            f"{', '.join(str(size[0]) for size in sorted(sizes))} columns",
            ANOTHER_FAMILY,
        )
    placed: list[tuple[int, RowSpan]] = []
    for own, spans in rows.items():
        part, place = parts.get(own, (RowSpan(None, 0, count_rows(spans)),)), 0
        for begin, end in spans:
            row = begin
            for span in _take(part, place, place + end - begin):
                placed.append((row, span))
                row += span.end - span.begin
            place += end - begin
    return _merge(span for _, span in sorted(placed, key=lambda item: item[0]))


def _origin(loras: Iterable[ModuleLora]) -> str:
    """The files that LoRAs come from."""
    return shorten(sorted({str(span.lora.up.span.path) for lora in loras for span in lora if span.lora}))


def _count(lora: ModuleLora) -> int:
    return sum(span.end - span.begin for span in lora)


def _take(lora: ModuleLora, begin: int, end: int) -> list[RowSpan]:
    """The rows from `begin` up to `end` of the module."""
    taken, place = [], 0
    for span in lora:
        low, high = max(begin, place), min(end, place + span.end - span.begin)
        if low < high:
            taken.append(RowSpan(span.lora, span.begin + low - place, span.begin + high - place))
        place += span.end - span.begin
    return taken


def _merge(spans: Iterable[RowSpan]) -> ModuleLora:
    """The same rows in as few spans as possible."""
    merged: list[RowSpan] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last and last.lora is span.lora and (last.end == span.begin or span.lora is None):
            merged[-1] = RowSpan(last.lora, last.begin, last.end + span.end - span.begin)
        else:
            merged.append(span)
    return tuple(merged)

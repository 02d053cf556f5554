"""The tensors of a converted LoRA: copied where they stay as they are, else made from the bytes of others. No torch.

Every change of weights stays what it was: rows are moved, zeros added, and scales multiplied into B where a dialect
stores none: exactly for powers of two, else in float32, rounded once.
"""

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.weights.dtypes import BITS_PER_ELEMENT
from diffsynth_core.weights.lora_names import DIALECTS, AlphaKeys, stem_keys
from diffsynth_core.weights.lora_rows import (
    ModuleLora,
    RowSpan,
    StoredLora,
    StoredTensor,
    group_by_down,
    loras_of,
)
from diffsynth_core.weights.values import FLOATS, pack_floats, read_bytes, unpack_floats
from diffsynth_core.weights.weight_sets import Span
from diffsynth_core.weights.weight_writer import OutputTensor, Pieces

WIDE_EXPONENTS = ("F32", "BF16", "F64")
"""Dtypes with so many exponents that a power of two never takes a weight out of them."""


@dataclass(frozen=True)
class WrittenLora:
    """One module of a converted file.

    `module`: as the dialect of the file calls it.
    `ranks`: those of the LoRAs that it is made of. `rank`: its own.
    `scales`: what was multiplied into B, other than 1.
    `exact`: nothing is rounded.
    """

    module: str
    tensors: tuple[OutputTensor, ...]
    ranks: tuple[int, ...]
    rank: int
    scales: tuple[float, ...]
    exact: bool


@dataclass(frozen=True)
class _Block:
    """LoRAs with the same A and the same scale, and the columns of B that are theirs, from `begin` on."""

    loras: tuple[StoredLora, ...]
    begin: int
    factor: float = 1.0

    @property
    def first(self) -> StoredLora:
        return self.loras[0]


def write_lora(module: str, lora: ModuleLora, dialect: str) -> WrittenLora:
    """What a dialect has of the LoRA of one of its modules.

    Raises:
        DiffSynthError: when values have to be computed that are stored in a format that cannot be computed with.
    """
    loras = loras_of(lora)
    blocks = _blocks(loras)
    rank = sum(block.first.rank for block in blocks)
    alpha, factors = _scales(blocks, rank, DIALECTS[dialect].alpha)
    blocks = [_Block(block.loras, block.begin, factor) for block, factor in zip(blocks, factors, strict=True)]
    keys = stem_keys(module, dialect)
    assert keys.down and keys.up
    tensors = [_down(keys.down, blocks, rank), _up(keys.up, lora, blocks, rank)]
    if alpha is not None:
        assert keys.alpha
        tensors.append(OutputTensor(keys.alpha, "F32", (), partial(_number, alpha)))
    scales = tuple(sorted({factor for factor in factors if factor != 1}))
    exact = all(map(_is_power_of_two, scales)) and alpha in (None, _rounded(alpha or 0.0))
    return WrittenLora(module, tuple(tensors), tuple(one.rank for one in loras), rank, scales, exact)


def _blocks(loras: Iterable[StoredLora]) -> list[_Block]:
    """LoRAs by what they multiply: those with equal A and scale can stand in the same columns of B."""
    blocks, begin = [], 0
    for same_down in group_by_down(loras):
        for scale in dict.fromkeys(lora.scale for lora in same_down):
            blocks.append(_Block(tuple(lora for lora in same_down if lora.scale == scale), begin))
            begin += same_down[0].rank
    return blocks


def _scales(blocks: Sequence[_Block], rank: int, policy: AlphaKeys) -> tuple[float | None, list[float]]:
    """The alpha that is written, if any, and what is multiplied into the rows of B of each block."""
    scales = [block.first.scale for block in blocks]
    stored = [lora.alpha for block in blocks for lora in block.loras if lora.alpha is not None]
    if policy == "never" or (policy == "kept" and not stored):
        return None, scales
    if len(set(scales)) == 1:
        return (stored[0] if stored and len(blocks) == 1 else scales[0] * rank), [1.0] * len(blocks)
    return float(rank), scales


def _is_power_of_two(scale: float) -> bool:
    return abs(math.frexp(scale)[0]) == 0.5


def _number(value: float) -> list[bytes]:
    return [struct.pack("<f", value)]


def _rounded(value: float) -> float:
    """A number as float32 has it."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _down(name: str, blocks: Sequence[_Block], rank: int) -> OutputTensor:
    """A: that of the first block, and those of the others below it."""
    downs = [block.first.down for block in blocks]
    if len(downs) == 1:
        return OutputTensor(name, downs[0].dtype, downs[0].shape, downs[0].span)
    dtype = _common_format(name, downs)
    return OutputTensor(name, dtype, (rank, *downs[0].shape[1:]), partial(_convert_all, downs, dtype))


def _convert_all(tensors: Sequence[StoredTensor], dtype: str) -> Iterator[bytes]:
    for tensor in tensors:
        data = read_bytes(tensor.span)
        yield data if tensor.dtype == dtype else pack_floats(unpack_floats(data, tensor.dtype), dtype)


def _up(name: str, lora: ModuleLora, blocks: Sequence[_Block], rank: int) -> OutputTensor:
    """B: each row in the columns of its block, zeros elsewhere."""
    ups = [one.up for block in blocks for one in block.loras]
    computed = [one.up for block in blocks for one in block.loras if block.factor != 1]
    in_place = all(_is_power_of_two(block.factor) for block in blocks) and all(
        up.dtype in WIDE_EXPONENTS for up in computed
    )
    dtype = _common_format(name, ups, as_stored=in_place)
    rows = sum(span.end - span.begin for span in lora)
    shape = (rows, rank, *ups[0].shape[2:])
    if len(lora) == 1 and not computed and shape == ups[0].shape:
        return OutputTensor(name, dtype, shape, ups[0].span)
    return OutputTensor(name, dtype, shape, _rows_of(lora, blocks, rank, dtype))


def _common_format(name: str, tensors: Sequence[StoredTensor], as_stored: bool = True) -> str:
    """The format of all of them where they have one and it will do, else float32, or float64 where one has that.

    Raises:
        DiffSynthError: when they would have to be computed with, and are stored in a format that is only copied.
    """
    stored = {tensor.dtype for tensor in tensors}
    if len(stored) == 1 and as_stored:
        return stored.pop()
    unknown = stored - FLOATS.keys()
    if unknown:
        path = tensors[0].span.path
        raise DiffSynthError(
            f"`{path}`: `{name}` has to be recomputed, which is not supported for dtype {', '.join(sorted(unknown))}",
            "use the file as it was trained, in bfloat16, float16 or float32",
        )
    return "F64" if "F64" in stored else "F32"


def _rows_of(lora: ModuleLora, blocks: Sequence[_Block], rank: int, dtype: str) -> Pieces:
    block_of = {id(one): block for block in blocks for one in block.loras}

    def make() -> Iterator[bytes]:
        for span in lora:
            yield _rows(span, block_of.get(id(span.lora)), rank, dtype)

    return make


def _rows(span: RowSpan[StoredLora], block: _Block | None, rank: int, dtype: str) -> bytes:
    """Rows of B as they are written; where nothing changes, and in the columns of other blocks, zeros."""
    import numpy

    count = span.end - span.begin
    if span.lora is None or block is None:
        return bytes(BITS_PER_ELEMENT[dtype] // 8 * count * rank)
    up = span.lora.up
    row_bytes = (up.span.end - up.span.begin) // up.shape[0]
    begin = up.span.begin + span.begin * row_bytes
    data = read_bytes(Span(up.span.path, begin, begin + count * row_bytes))
    if up.dtype != dtype or block.factor != 1:
        data = pack_floats(unpack_floats(data, up.dtype) * block.factor, dtype)
    if rank == span.lora.rank:
        return data
    width = BITS_PER_ELEMENT[dtype] // 8
    wide = numpy.zeros((count, rank * width), numpy.uint8)
    narrow = numpy.frombuffer(data, numpy.uint8).reshape(count, -1)
    wide[:, block.begin * width : block.begin * width + narrow.shape[1]] = narrow
    return wide.tobytes()

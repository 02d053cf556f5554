"""The tensors of a converted LoRA: copied if they stay unchanged, else computed from the bytes of others. No torch.

The change of each weight stays the same: rows are moved, zeros added, and scales multiplied into B if a format stores
none: exactly for powers of two, else in float32, rounded once.
"""

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from diffsynth_core.config.choices import LoraFormat
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.weights.dtypes import BITS_PER_ELEMENT
from diffsynth_core.weights.lora import (
    LoraPair,
    ModuleLora,
    RowSpan,
    StoredTensor,
    group_by_a,
    num_rows,
    pairs_of,
)
from diffsynth_core.weights.lora_formats import LORA_FORMATS, AlphaKeys, keys_of_part
from diffsynth_core.weights.values import FLOATS, pack_floats, read_bytes, unpack_floats
from diffsynth_core.weights.weight_sets import Span
from diffsynth_core.weights.weight_writer import OutputTensor, Pieces

WIDE_EXPONENTS = ("F32", "BF16", "F64")
"""Dtypes whose range of exponents is so wide that a factor of a power of two never overflows."""


@dataclass(frozen=True)
class WrittenLora:
    """One module of a converted file.

    `module`: its name in the format of the file.
    `ranks`: those of the LoRAs that it consists of. `rank`: its own.
    `scales`: the factors other than 1 that are multiplied into B.
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
    """LoRAs with the same A and scale, and the columns of B that they share, from `begin` on."""

    pairs: tuple[LoraPair, ...]
    begin: int
    factor: float = 1.0

    @property
    def first(self) -> LoraPair:
        return self.pairs[0]


def write_lora(module: str, lora: ModuleLora, lora_format: LoraFormat) -> WrittenLora:
    """The LoRA of one module of a format, as the format stores it.

    Raises:
        DiffSynthError: when values have to be computed from a dtype that is only copied.
    """
    pairs = pairs_of(lora)
    blocks = _blocks(pairs)
    rank = sum(block.first.rank for block in blocks)
    alpha, factors = _scales(blocks, rank, LORA_FORMATS[lora_format].alpha)
    blocks = [_Block(block.pairs, block.begin, factor) for block, factor in zip(blocks, factors, strict=True)]
    keys = keys_of_part(module, lora_format)
    assert keys.A and keys.B
    tensors = [_tensor_a(keys.A, blocks, rank), _tensor_b(keys.B, lora, blocks, rank)]
    if alpha is not None:
        assert keys.alpha
        tensors.append(OutputTensor(keys.alpha, "F32", (), partial(_number, alpha)))
    scales = tuple(sorted({factor for factor in factors if factor != 1}))
    exact = all(map(_is_power_of_two, scales)) and alpha in (None, _rounded(alpha or 0.0))
    return WrittenLora(module, tuple(tensors), tuple(pair.rank for pair in pairs), rank, scales, exact)


def _blocks(pairs: Iterable[LoraPair]) -> list[_Block]:
    """LoRAs that can share columns of B: those with equal A and equal scale."""
    blocks, begin = [], 0
    for group in group_by_a(pairs):
        for scale in dict.fromkeys(pair.scale for pair in group):
            blocks.append(_Block(tuple(pair for pair in group if pair.scale == scale), begin))
            begin += group[0].rank
    return blocks


def _scales(blocks: Sequence[_Block], rank: int, policy: AlphaKeys) -> tuple[float | None, list[float]]:
    """The alpha that is written, if any, and what is multiplied into the rows of B of each block."""
    scales = [block.first.scale for block in blocks]
    stored = [pair.alpha for block in blocks for pair in block.pairs if pair.alpha is not None]
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


def _tensor_a(name: str, blocks: Sequence[_Block], rank: int) -> OutputTensor:
    """A: that of the first block, and those of the others below it."""
    matrices = [block.first.A for block in blocks]
    if len(matrices) == 1:
        return OutputTensor(name, matrices[0].dtype, matrices[0].shape, matrices[0].span)
    dtype = _common_dtype(name, matrices)
    return OutputTensor(name, dtype, (rank, *matrices[0].shape[1:]), partial(_convert_all, matrices, dtype))


def _convert_all(tensors: Sequence[StoredTensor], dtype: str) -> Iterator[bytes]:
    for tensor in tensors:
        data = read_bytes(tensor.span)
        yield data if tensor.dtype == dtype else pack_floats(unpack_floats(data, tensor.dtype), dtype)


def _tensor_b(name: str, lora: ModuleLora, blocks: Sequence[_Block], rank: int) -> OutputTensor:
    """B: each row in the columns of its block, zeros elsewhere."""
    matrices = [pair.B for block in blocks for pair in block.pairs]
    computed = [pair.B for block in blocks for pair in block.pairs if block.factor != 1]
    in_place = all(_is_power_of_two(block.factor) for block in blocks) and all(
        matrix.dtype in WIDE_EXPONENTS for matrix in computed
    )
    dtype = _common_dtype(name, matrices, as_stored=in_place)
    shape = (num_rows(lora), rank, *matrices[0].shape[2:])
    if len(lora) == 1 and not computed and shape == matrices[0].shape:
        return OutputTensor(name, dtype, shape, matrices[0].span)
    return OutputTensor(name, dtype, shape, _rows_of(lora, blocks, rank, dtype))


def _common_dtype(name: str, tensors: Sequence[StoredTensor], as_stored: bool = True) -> str:
    """The dtype of all of them if it is the same and suffices, else float32, or float64 if one of them has that.

    Raises:
        DiffSynthError: when they have to be computed with, and one has a dtype that is only copied.
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
    block_of = {id(pair): block for block in blocks for pair in block.pairs}

    def make() -> Iterator[bytes]:
        for span in lora:
            yield _rows(span, block_of.get(id(span.stored)), rank, dtype)

    return make


def _rows(span: RowSpan[LoraPair], block: _Block | None, rank: int, dtype: str) -> bytes:
    """Rows of B as they are written; zeros where nothing changes, and in the columns of other blocks."""
    import numpy

    count = span.end - span.begin
    if span.stored is None or block is None:
        return bytes(BITS_PER_ELEMENT[dtype] // 8 * count * rank)
    b = span.stored.B
    row_bytes = (b.span.end - b.span.begin) // b.shape[0]
    begin = b.span.begin + span.begin * row_bytes
    data = read_bytes(Span(b.span.path, begin, begin + count * row_bytes))
    if b.dtype != dtype or block.factor != 1:
        data = pack_floats(unpack_floats(data, b.dtype) * block.factor, dtype)
    if rank == span.stored.rank:
        return data
    width = BITS_PER_ELEMENT[dtype] // 8
    wide = numpy.zeros((count, rank * width), numpy.uint8)
    narrow = numpy.frombuffer(data, numpy.uint8).reshape(count, -1)
    wide[:, block.begin * width : block.begin * width + narrow.shape[1]] = narrow
    return wide.tobytes()

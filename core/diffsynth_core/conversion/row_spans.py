"""Tensors as byte ranges in files: renamed, split by rows, stacked and reshaped without reading a byte. No torch.

The rows of a tensor are consecutive in its file, so the operations of layouts on tensors (weights/key_maps.py) select
byte ranges. `RowSpans` implements the methods of a tensor that key maps use.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from diffsynth_core.weights.dtypes import BITS_PER_ELEMENT
from diffsynth_core.weights.weight_sets import Span, WeightSet
from diffsynth_core.weights.weight_writer import OutputTensor


@dataclass
class RowSpans:
    """A tensor of which only shape, safetensors dtype and byte ranges are known."""

    shape: tuple[int, ...]
    dtype: str
    spans: list[Span] = field(default_factory=list)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * BITS_PER_ELEMENT[self.dtype] // 8

    def _rows(self, begin: int, end: int) -> "RowSpans":
        """Return the rows from `begin` to `end` (exclusive)."""
        wanted_begin, wanted_end = begin * self._row_bytes, end * self._row_bytes
        found, place = [], 0
        for span in self.spans:
            length = span.end - span.begin
            first, last = max(wanted_begin - place, 0), min(wanted_end - place, length)
            if first < last:
                found.append(Span(span.path, span.begin + first, span.begin + last))
            place += length
        return RowSpans((end - begin, *self.shape[1:]), self.dtype, found)

    def split(self, rows: Sequence[int]) -> list["RowSpans"]:
        """Split into parts with these numbers of rows."""
        ends = [sum(rows[: place + 1]) for place in range(len(rows))]
        return [self._rows(end - count, end) for end, count in zip(ends, rows, strict=True)]

    def roll(self, rows: int, axis: int) -> "RowSpans":
        """Move the last `rows` rows to the top; `axis` is 0."""
        assert axis == 0
        upper, lower = self.split([len(self) - rows, rows])
        return RowSpans(self.shape, self.dtype, [*lower.spans, *upper.spans])

    def reshape(self, shape: tuple[int, ...]) -> "RowSpans":
        """Return the same bytes with another shape."""
        return RowSpans(tuple(shape), self.dtype, self.spans)

    def new_empty(self, shape: tuple[int, ...]) -> "RowSpans":
        """Return a tensor of the same dtype, to be filled from the top."""
        return RowSpans(tuple(shape), self.dtype)

    def __setitem__(self, rows: slice, part: "RowSpans") -> None:
        """Fill the next rows.

        Parts of another dtype are dropped: the tensor stays incomplete, which is reported when it is written.
        """
        if part.dtype == self.dtype:
            self.spans += part.spans

    def output(self, name: str) -> OutputTensor:
        """Return the output tensor with these bytes."""
        return OutputTensor(name, self.dtype, self.shape, tuple(self.spans))


def row_spans(weights: WeightSet, name: str) -> RowSpans:
    """Return a tensor of a weight set."""
    tensor = weights.tensors[name]
    return RowSpans(tensor.shape, tensor.dtype, [weights.spans[name]])

"""Values of single tensors, from their bytes in a file and back. No torch."""

from typing import TYPE_CHECKING

from diffsynth_core.weights.weight_sets import Span

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

EXPONENTS = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80}
"""Where a number has all of these bits set, it is infinite or none."""


FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""Dtypes of weights, by their names in safetensors -> in numpy, which knows no bfloat16."""


def read_bytes(span: Span) -> bytes:
    """Bytes of a file."""
    with span.path.open("rb") as stream:
        stream.seek(span.begin)
        return stream.read(span.end - span.begin)


def all_finite(span: Span, dtype: str) -> bool:
    """Whether a tensor holds neither NaN nor infinity; formats that have none are not read."""
    if dtype not in EXPONENTS:
        return True
    import numpy

    bits = numpy.frombuffer(read_bytes(span), {"F64": "<u8", "F32": "<u4"}.get(dtype, "<u2"))
    mask = bits.dtype.type(EXPONENTS[dtype])
    return not bool(numpy.any((bits & mask) == mask))


def unpack_floats(data: bytes, dtype: str) -> "NDArray[float64]":
    """The values of weights from their bytes; `dtype` is one of `FLOATS`."""
    import numpy

    stored = numpy.frombuffer(data, FLOATS[dtype])
    if dtype == "BF16":
        stored = (stored.astype("<u4") << 16).view("<f4")
    return stored.astype(numpy.float64)


def pack_floats(values: "NDArray[float64]", dtype: str) -> bytes:
    """The bytes of weights, rounded to a dtype once; in bfloat16, values that it holds as they are."""
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype(FLOATS[dtype]).tobytes()

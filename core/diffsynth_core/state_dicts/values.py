"""Values of single tensors, from their bytes in a file. No torch."""

from diffsynth_core.state_dicts.weight_sets import Span

EXPONENTS = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80}
"""Where a number has all of these bits set, it is infinite or none."""


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

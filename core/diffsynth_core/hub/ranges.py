"""HTTP range requests: what to send, and what the response contains."""

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from http import HTTPStatus

from diffsynth_core.hub.client import TransientHubError

CHUNK_BYTES = 64 * 1024
"""Bytes read at a time, which is the most that a broken connection loses."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


def range_headers(start: int) -> dict[str, str]:
    """Return headers for the bytes from `start`, uncompressed: offsets in compressed bytes would not match."""
    return {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})


def first_byte(status: int, headers: Mapping[str, str], size: int) -> int:
    """Return the offset of the first byte of a response: 0 from a server without ranges, which sends the whole file.

    Args:
        size: size of the file according to the hub's file list. A response of another size, such as a login page,
            would otherwise be appended, and noticed only by the checksum of the complete file.

    Raises:
        TransientHubError: if the response is a part without a declared range, or of a file of another size.
    """
    start, declared = 0, headers.get("Content-Length", "")
    if status == HTTPStatus.PARTIAL_CONTENT:
        match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
        if match is None:
            raise TransientHubError("the hub sent a part of the file without declaring which")
        start, declared = int(match[1]), match[2]
    elif "Content-Encoding" in headers:  # the length is that of the encoded bytes
        declared = ""
    if declared.isdecimal() and int(declared) != size:
        raise TransientHubError(f"the hub sent a file of {declared} bytes, but its file list declares {size}")
    return start


def chunks_within(context: AbstractContextManager[None], chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the chunks inside `context`, which is entered with the first of them."""
    with context:
        yield from chunks

"""The part of HTTP that resuming needs: what is asked for, and what came."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from http import HTTPStatus

from diffsynth_core.sources.hub import Interruption

CHUNK_BYTES = 64 * 1024
"""Bytes read at a time: what a broken connection loses at most, and enough for a fast one."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(?:\d+|\*)")


def range_headers(start: int) -> dict[str, str]:
    """Ask for the bytes from `start` on, as they are stored: compressed ones could not be counted."""
    return {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})


def first_byte(status: int, content_range: str | None) -> int:
    """Where the bytes of an answer begin; a server that knows no ranges sends the whole file.

    Raises:
        Interruption: when it sends a part and does not say which.
    """
    if status != HTTPStatus.PARTIAL_CONTENT:
        return 0
    match = _CONTENT_RANGE.fullmatch((content_range or "").strip())
    if match is None:
        raise Interruption("the hub sent a part of the file and did not say which")
    return int(match[1])


def chunks_within(context: AbstractContextManager[None], chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Bytes as they come, in a context that is entered with the first of them."""
    with context:
        yield from chunks

"""The part of HTTP that resuming needs: what is asked for, and what came."""

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from http import HTTPStatus

from diffsynth_core.hub.client import TransientHubError

CHUNK_BYTES = 64 * 1024
"""Bytes read at a time: what a broken connection loses at most, and enough for a fast one."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


def range_headers(start: int) -> dict[str, str]:
    """Ask for the bytes from `start` on, as they are stored: compressed ones could not be counted."""
    return {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})


def first_byte(status: int, headers: Mapping[str, str], size: int) -> int:
    """Where the bytes of an answer begin; a server that knows no ranges sends the whole file.

    `size`: that of the file in the hub's list. What answers with another, such as a page to log in at, would become
    the beginning of a file whose hash is wrong when all of it has come.

    Raises:
        TransientHubError: when it sends a part and does not say which, or of a file of another size.
    """
    start, told = 0, headers.get("Content-Length", "")
    if status == HTTPStatus.PARTIAL_CONTENT:
        match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
        if match is None:
            raise TransientHubError("the hub sent a part of the file without declaring which")
        start, told = int(match[1]), match[2]
    elif "Content-Encoding" in headers:  # the length is that of the encoded bytes
        told = ""
    if told.isdecimal() and int(told) != size:
        raise TransientHubError(f"the hub sent a file of {told} bytes, but its file list declares {size}")
    return start


def chunks_within(context: AbstractContextManager[None], chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Bytes as they come, in a context that is entered with the first of them."""
    with context:
        yield from chunks

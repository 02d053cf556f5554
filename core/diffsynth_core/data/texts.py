"""Text files written by people: UTF-8, and what they are if not. No torch."""

import codecs
from pathlib import Path

UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""Byte order marks of UTF-16."""
MAX_CAPTION_CHARACTERS = 100_000
"""Maximum length of a caption. Text encoders read a few hundred words; a longer text is another file, and takes
minutes to tokenize.
"""
BINARY = ": it contains binary data"
"""Suffix of messages about binary files."""
SAVE_AS_UTF8 = "save it as UTF-8"
"""Hint for files in other encodings."""


def decode_text(content: bytes) -> str:
    """Return the text of a file, without its byte order mark.

    Raises:
        UnicodeDecodeError: if it is not UTF-8; UTF-16 can be valid UTF-8 with a NUL in each character.
    """
    nul = content.find(b"\0")
    if nul >= 0:
        raise UnicodeDecodeError("utf-8", content, nul, nul + 1, "a NUL")
    return content.decode("utf-8").removeprefix("\ufeff")


def read_caption(path: Path) -> str:
    """Return the caption in a text file, stripped.

    Raises:
        UnicodeDecodeError: if it is not UTF-8.
        OSError: if it cannot be read.
    """
    return decode_text(path.read_bytes()).strip()


def likely_encoding(error: UnicodeDecodeError) -> str:
    """Return the likely encoding of a text that is not UTF-8, as the end of a sentence; empty if unknown."""
    content = error.object
    if content.startswith(UTF_16_MARKS):
        return ": it is UTF-16 (`Unicode Text` of Excel, `Unicode` of Notepad)"
    if error.reason == "a NUL":
        head = content[:64]  # of Latin letters in UTF-16, every second byte is a NUL
        pairs = len(head) // 2
        return ": it looks like UTF-16" if 2 * max(head[0::2].count(0), head[1::2].count(0)) > pairs else BINARY
    return BINARY if b"\0" in content else ": it looks like Windows-1252 or Latin-1"

"""Text files that people write: always UTF-8, and what else they are when they are not. No torch."""

import codecs
from pathlib import Path

UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
MAX_CAPTION_CHARACTERS = 100_000
"""Of a caption. Text encoders read some hundred words; one that has megabytes is another file, and takes minutes to cut
into tokens."""
BINARY = ": it contains binary data"
SAVE_AS_UTF8 = "save it as UTF-8"


def decode_text(content: bytes) -> str:
    """The text of a file, without its byte order mark.

    Raises:
        UnicodeDecodeError: when it is not UTF-8; one of UTF-16 can look as if it were, with a NUL in each character.
    """
    nul = content.find(b"\0")
    if nul >= 0:
        raise UnicodeDecodeError("utf-8", content, nul, nul + 1, "a NUL")
    return content.decode("utf-8").removeprefix("\ufeff")


def read_caption(path: Path) -> str:
    """The caption in a text file, without blanks at its ends.

    Raises:
        UnicodeDecodeError: when it is not UTF-8.
        OSError: when it cannot be read.
    """
    return decode_text(path.read_bytes()).strip()


def likely_encoding(error: UnicodeDecodeError) -> str:
    """What a text that is not UTF-8 probably is, to go on a sentence; blank where there is no telling."""
    content = error.object
    if content.startswith(UTF_16_MARKS):
        return ": it is UTF-16 (`Unicode Text` of Excel, `Unicode` of Notepad)"
    if error.reason == "a NUL":
        head = content[:64]  # of Latin letters in UTF-16, every second byte is a NUL
        pairs = len(head) // 2
        return ": it looks like UTF-16" if 2 * max(head[0::2].count(0), head[1::2].count(0)) > pairs else BINARY
    return BINARY if b"\0" in content else ": it looks like Windows-1252 or Latin-1"

"""The font of a grid's labels, and what is drawn in place of characters that no font of the machine has. No torch."""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from PIL import ImageFont

from diffsynth_core.progress import pluralize

FONT_SIZE = 15
"""In pixels."""
FONT_FILES = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf"),
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "SourceHanSans-Regular.ttc", "DroidSansFallbackFull.ttf"),
    *("wqy-microhei.ttc", "wqy-zenhei.ttc", "uming.ttc"),
    *("Arial Unicode.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc"),
    *("msyh.ttc", "YuGothM.ttc", "malgun.ttf"),
)
"""Fonts of Linux distributions, macOS and Windows, which Pillow looks up where the system has its fonts: those for most
alphabets first, then those that have Chinese, Japanese and Korean characters too.
"""
IN_NO_FONT = "\uffff"
"""A noncharacter, which shows how a font draws what it lacks."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class LabelFont:
    """A font, and the characters of the labels that neither it nor another one has."""

    font: Font
    missing: tuple[str, ...] = ()

    def drawable(self, text: str) -> str:
        """Return a label with a note, such as `[2 characters]`, in place of each run of missing characters."""
        if not self.missing:
            return text
        runs = f"[{re.escape(''.join(self.missing))}]+"
        return re.sub(runs, lambda run: f"[{pluralize(len(run[0]), 'character')}]", text)


def choose_font(labels: Sequence[str]) -> LabelFont:
    """Return Pillow's own font if it has all characters of the labels: it is the same on every machine, but has those
    of English alone. Otherwise the installed font that lacks the fewest.
    """
    text = "".join(labels)
    best: LabelFont | None = None
    for font in _fonts():
        found = LabelFont(font, missing_characters(font, text))
        if best is None or len(found.missing) < len(best.missing):
            best = found
        if not best.missing:
            break
    assert best
    return best


def _fonts() -> Iterator[Font]:
    yield ImageFont.load_default(FONT_SIZE)
    for name in FONT_FILES:
        with suppress(OSError):  # not installed
            yield ImageFont.truetype(name, FONT_SIZE)


def missing_characters(font: Font, text: str) -> tuple[str, ...]:
    """Return the characters of a text that a font lacks, each once: Pillow draws them as it draws a noncharacter."""
    box = _glyph(font, IN_NO_FONT)
    return tuple(one for one in dict.fromkeys(text) if not one.isspace() and _glyph(font, one) == box)


def _glyph(font: Font, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)

"""Lines as wide as the terminal, with what goes on below set in to where its value begins."""

import re
import shutil
import sys
import textwrap

MARGIN = re.compile(r" *(?:[\d.]+ \w+  |\S+  +)?")
"""What the value of a line begins behind: blanks, and an amount or a name in a column of its own."""
SET_IN = 6
"""Columns that lines are set in by where a word of the value has no room behind its margin."""


def terminal_width() -> int | None:
    """Columns of the terminal; None where stdout is none, so that lines stay whole for programs."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrap_line(line: str, width: int | None) -> str:
    """A line, or several, of at most `width` columns as far as its words allow; None: as it is."""
    if width is None or len(line) <= width:
        return line
    margin = MARGIN.match(line)
    start = max(2, margin.end() if margin else 0)
    if max(map(len, line[start:].split())) > width - start:
        start = SET_IN
    return textwrap.fill(line, width, subsequent_indent=" " * start, break_long_words=False, break_on_hyphens=False)

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


HELP_COLUMNS = 80
"""Help is no wider than that, however wide the terminal."""
_PIECE = re.compile(r"--?[a-z_-]+(?: +(?!-)(?:'[^']*'|\S+))*|'[^']*'|\S+")
"""An option with its values, or another word: what an example is not broken within."""


def help_with_examples(text: str, *examples: str) -> str:
    """The help of a command, with examples that can be pasted: long ones go on behind a backslash.

    A line that is `\\b` alone keeps what follows from being wrapped again.
    """
    width = min(shutil.get_terminal_size().columns, HELP_COLUMNS) - 4
    shown = ["\b\n  " + "\n  ".join(_break_command(example, width)) for example in examples]
    return "\n\n".join([text.strip(), "Examples:", *shown]) + "\n"


def _break_command(command: str, width: int) -> list[str]:
    """The lines of a command, of at most `width` columns as far as its words allow."""
    lines: list[str] = []
    room = width - len("     \\")
    pieces = [
        part for piece in _PIECE.findall(command) for part in ([piece] if len(piece) <= room else piece.split(" "))
    ]
    for piece in pieces:
        if lines and len(lines[-1]) + len(piece) + 3 <= width:
            lines[-1] += f" {piece}"
        else:
            lines.append(f"    {piece}" if lines else piece)
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]

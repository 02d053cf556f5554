"""Wrapping lines to the width of the terminal, with continuation lines indented to the start of the value."""

import re
import shutil
import sys
import textwrap

MARGIN = re.compile(r" *(?:[\d.]+ \w+  |\S+  +)?")
"""What precedes the value of a line: an indent, and a number or label in a column of its own."""
SET_IN = 6
"""The indent of continuation lines if a word does not fit after that of the value."""


def terminal_width() -> int | None:
    """The width of the terminal; None if stdout is not one, so that lines stay whole for other programs."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrap_line(line: str, width: int | None) -> str:
    """Wrap a line to `width` columns as far as its words allow; None: unchanged."""
    if width is None or len(line) <= width:
        return line
    margin = MARGIN.match(line)
    start = max(2, margin.end() if margin else 0)
    if max(map(len, line[start:].split())) > width - start:
        start = SET_IN
    return textwrap.fill(line, width, subsequent_indent=" " * start, break_long_words=False, break_on_hyphens=False)


HELP_COLUMNS = 80
"""Maximum width of help, however wide the terminal."""
_PIECE = re.compile(r"--?[a-z_-]+(?: +(?!-)(?:'[^']*'|\S+))*|'[^']*'|\S+")
"""An option with its values, or another word: examples are never broken inside one."""


def help_with_examples(text: str, *examples: str) -> str:
    """Format the help of a command, with examples that can be pasted: long ones are continued after a backslash.

    A line with `\\b` alone prevents the following lines from being wrapped again.
    """
    width = min(shutil.get_terminal_size().columns, HELP_COLUMNS) - 4
    shown = ["\b\n  " + "\n  ".join(_break_command(example, width)) for example in examples]
    return "\n\n".join([text.strip(), "Examples:", *shown]) + "\n"


def _break_command(command: str, width: int) -> list[str]:
    """Wrap a command to `width` columns as far as its words allow."""
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

"""The one way of text to the terminal: what would steer it is spelled out, whoever wrote it.

Names of files and tensors, captions, keys of YAML and answers of hubs come from elsewhere, and end up in messages. An
escape sequence in one could clear the screen, retitle the window or hide what is shown; marks of writing direction
could make one name look like another. They are shown as `\\u001b` and the like, which JSON reads back as they were.
"""

import re

import typer

_STEERING = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
"""Control characters, line separators, marks that override the direction of writing, and halves of characters: bytes of
a file name that are not UTF-8 are kept as such halves, which no stream can encode."""
_IN_A_LINE = re.compile(rf"[\t\n{_STEERING}]")
_IN_A_MESSAGE = re.compile(rf"\n(?! )|[\t{_STEERING}]")
_IN_A_TEXT = re.compile(rf"[{_STEERING}]")


def _spell_out(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def printable(line: str) -> str:
    """A line whose control characters, tabs and line breaks among them, are spelled out."""
    return _IN_A_LINE.sub(_spell_out, line)


def printable_message(message: str) -> str:
    """As `printable`, but a message may go on in lines that are set in: no name can feign a line of its own."""
    return _IN_A_MESSAGE.sub(_spell_out, message)


def printable_text(text: str) -> str:
    """As `printable`, but with line breaks and tabs kept: for texts of many lines that were made as such, and JSON."""
    return _IN_A_TEXT.sub(_spell_out, text)


def echo(text: str = "", err: bool = False) -> None:
    """Print a text of any number of lines."""
    typer.echo(printable_text(text), err=err)


def echo_line(line: str, err: bool = False) -> None:
    """Print a line, which may go on in lines that are set in."""
    typer.echo(printable_message(line), err=err)


def echo_styled(
    text: str, color: str | None, bold: bool | None = None, newline: bool = True, err: bool = False
) -> None:
    """Print a line in a colour; None: in none, and then without any escape sequence."""
    if color is None and not bold:
        typer.echo(printable_message(text), nl=newline, err=err)
        return
    typer.secho(printable_message(text), fg=color, bold=bold, nl=newline, err=err)

"""All output to the terminal goes through here, with control characters escaped, whatever their source.

File names, tensor names, captions, YAML keys and responses of hubs are foreign text that ends up in messages. An escape
sequence in it could clear the screen, change the title or hide text, and bidirectional marks could make one name look
like another. They are printed as `\\u001b` and the like, which JSON reads back unchanged.
"""

import re

import typer

_STEERING = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
"""Control characters, line separators, bidirectional overrides and unpaired surrogates. Python decodes bytes of a file
name that are not UTF-8 to such surrogates, which no stream can encode.
"""
_IN_A_LINE = re.compile(rf"[\t\n{_STEERING}]")
_IN_A_MESSAGE = re.compile(rf"\n(?! )|[\t{_STEERING}]")
_IN_A_TEXT = re.compile(rf"[{_STEERING}]")


def _spell_out(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def printable(line: str) -> str:
    """Escape all control characters in a line, tabs and line breaks included."""
    return _IN_A_LINE.sub(_spell_out, line)


def printable_message(message: str) -> str:
    """As `printable`, but keep line breaks that are followed by an indent: a name cannot pass for a line of its own."""
    return _IN_A_MESSAGE.sub(_spell_out, message)


def printable_text(text: str) -> str:
    """As `printable`, but keep line breaks and tabs: for multi-line output composed here, and JSON."""
    return _IN_A_TEXT.sub(_spell_out, text)


def echo(text: str = "", err: bool = False) -> None:
    """Print text of any number of lines."""
    typer.echo(printable_text(text), err=err)


def echo_line(line: str, err: bool = False) -> None:
    """Print a line, which may have indented continuation lines."""
    typer.echo(printable_message(line), err=err)


def echo_styled(
    text: str, color: str | None, bold: bool | None = None, newline: bool = True, err: bool = False
) -> None:
    """Print a line in a color; None: without any escape sequence."""
    if color is None and not bold:
        typer.echo(printable_message(text), nl=newline, err=err)
        return
    typer.secho(printable_message(text), fg=color, bold=bold, nl=newline, err=err)

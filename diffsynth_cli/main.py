"""Entry point: the commands, and the one boundary where errors become messages and exit codes."""

import os
import sys
from collections.abc import Sequence

from diffsynth_cli import REPORTS, STOPPED
from diffsynth_cli.app import COMMANDS, build_app
from diffsynth_cli.completion import LINE_VARIABLES, typed_line
from diffsynth_cli.printing import echo
from diffsynth_cli.streams import guarded_streams

GROUPS = ("run", "dataset", "recipe")
"""Commands that have subcommands."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 wrong use, 128 + N stopped by signal N."""
    with guarded_streams():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    named = next((word for word in words or _typed_words() if not word.startswith("-")), None)
    try:
        app = build_app(named)
        outcome = app(words, standalone_mode=False, prog_name="diffsynth")
    except Exception as error:
        return _report(error, words, named)
    except KeyboardInterrupt:
        outcome = STOPPED
    if outcome == STOPPED:  # Typer uses this exit code for Ctrl-C too, without a message
        echo("Interrupted", err=True)
    return outcome if isinstance(outcome, int) else 0


def _typed_words() -> list[str]:
    """The words after `diffsynth` of a line that a shell completes; typer reads them as changed here."""
    for variable in LINE_VARIABLES:
        if os.environ.get(variable):
            os.environ[variable] = line = typed_line()
            return line.split()[1:]
    return []


def _report(error: Exception, words: Sequence[str], named: str | None) -> int:
    """Print an error to stderr, or report it to the launcher that prints it once for all processes; returns the exit
    code."""
    from diffsynth_cli.errors import ending_of

    given = list(words[words.index(named) :][: 2 if named in GROUPS else 1]) if named in COMMANDS else []
    ending = ending_of(error, " ".join(["diffsynth", *(word for word in given if not word.startswith("-"))]))
    if REPORTS in os.environ:
        from diffsynth_cli.ranks import report_ending

        if report_ending(ending):
            return ending.code
    ending.show()
    return ending.code

"""Errors as the user sees them."""

import errno
import os
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from diffsynth_cli.printing import echo, echo_styled, printable
from diffsynth_core.errors import EXIT_FAILED, EXIT_WRONG_USE, DiffSynthError, Interrupted, OutOfTime, Problem, truncate
from diffsynth_core.files import default_cache_path

SHOWN_OF_A_NAME = 200
"""Maximum number of characters of a name in a message."""
HINTS_FOR_FILES = {
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ENOENT: "restore it and run the command again",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.ELOOP: "fix the symbolic links in its path",
}
"""Hints for operating system errors that name a file."""
SHOWN_OF_A_KIND = 10
"""Maximum number of dataset messages of one kind that are printed: thousands of rows may have the same problem."""
CONTINUED = " " * len("error: ")
"""Indentation of the lines of a message after the first."""


@dataclass(frozen=True)
class Ending:
    """Why a command failed or was stopped: its exit code and its message.

    `sentence` replaces the list of problems if nothing went wrong, as after a signal.
    """

    code: int
    problems: tuple[Problem, ...] = ()
    sentence: str = ""

    def lines(self) -> Iterator[str]:
        """The message without colors, as written to the log of a run."""
        if self.sentence:
            yield self.sentence
        for problem in self.problems:
            yield f"error: {problem.message}"
            if problem.hint:
                yield f"  hint: {problem.hint}"

    def show(self) -> None:
        """Print the message to stderr."""
        if self.sentence:
            echo(self.sentence, err=True)
        print_problems(self.problems)
        if len(self.problems) > 1:
            echo(f"{len(self.problems)} problems", err=True)


def exit_code_of(error: Exception) -> int:
    """Print an error to stderr and return the exit code."""
    ending = ending_of(error)
    ending.show()
    return ending.code


def ending_of(error: Exception, command: str = "diffsynth") -> Ending:
    """Convert an exception into what the user sees; only internal errors have a traceback, which is saved to a file.

    `command`: the command that was called, whose help is suggested after wrong use.
    """
    if isinstance(error, Interrupted):
        return Ending(error.exit_code, sentence=sentence_of(error))
    if isinstance(error, DiffSynthError):
        return Ending(error.exit_code, error.problems)
    usage = getattr(error, "format_message", None)
    if callable(usage) and str(usage()).startswith("Usage: "):
        # No command was given: show the help.
        return Ending(EXIT_WRONG_USE, sentence=str(usage()))
    if callable(usage):
        return Ending(EXIT_WRONG_USE, (_usage_problem(error, str(usage()).rstrip("."), command),))
    if isinstance(error, OSError) and (error.filename or error.errno in HINTS_FOR_FILES):
        return Ending(EXIT_FAILED, (_file_problem(error),))
    path = _write_traceback(error)
    what = f"internal error: {type(error).__name__}: {' '.join(str(error).split())}"
    return Ending(
        EXIT_FAILED, (Problem(what, f"this is a bug in diffsynth; please report it with the traceback in `{path}`"),)
    )


_EXPECTED = {
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_parsing": "a number",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
}
"""What pydantic, which converts Typer's values, expected instead of a string, by error type."""


def _usage_problem(error: Exception, message: str, command: str) -> Problem:
    """A usage error raised by Typer: an unknown command, a missing value, a value of another type."""
    from diffsynth_core.config.parameters import SETTINGS

    cause = error.__cause__
    detail = cause.errors()[0] if isinstance(cause, ValidationError) else None
    if detail and detail["type"] in _EXPECTED:
        option = message.partition("'")[2].partition("'")[0]
        expected = _EXPECTED[detail["type"]].format(**detail.get("ctx", {}))
        return Problem(f"`{option}` takes {expected}, got `{detail['input']}`")
    setting = SETTINGS.get(getattr(error, "option_name", "").lstrip("-").replace("-", "_"))
    if setting and setting.choices:
        return Problem(message, f"pass `--{setting.name} {'|'.join(setting.choices)}`")
    context = getattr(error, "ctx", None)
    help_of = context.command_path if context else command
    return Problem(message.replace("Value error, ", ""), f"see `{help_of} --help`")


def _file_problem(error: OSError) -> Problem:
    """An operating system error on a file that no command handled: it was deleted or locked meanwhile, its name is too
    long, or its disk has gone."""
    name = error.filename.decode("utf-8", "surrogateescape") if isinstance(error.filename, bytes) else error.filename
    if isinstance(error, PermissionError):
        what = f"cannot open `{name}`: {error.strerror}"
        return Problem(what, "change its permissions, or remove it from the command")
    where = f"cannot access `{truncate(str(name), SHOWN_OF_A_NAME)}`" if name else "cannot write a file"
    what = f"{where}: {error.strerror}"
    return Problem(what, HINTS_FOR_FILES.get(error.errno or 0, "check the path and the disk it is on"))


def sentence_of(error: Interrupted | OutOfTime) -> str:
    """Why and where a run stopped, in one sentence."""
    (problem,) = error.problems
    sentence = "; ".join(part for part in (problem.message, problem.hint) if part)
    return sentence[0].upper() + sentence[1:]


def lines_for_log(error: BaseException) -> Iterator[str]:
    """How a run ended, for its log: the message printed to the terminal, and the traceback of an internal error."""
    if isinstance(error, DiffSynthError):
        yield from ending_of(error).lines()
    else:
        yield f"error: {''.join(traceback.format_exception(error))}".rstrip()


def print_problems(problems: Iterable[Problem]) -> None:
    """Print problems to stderr; those of a dataset grouped by kind, with one hint per group."""
    for kind in _by_kind(problems):
        print_problem(kind[0], [problem.message for problem in kind[1:SHOWN_OF_A_KIND]], len(kind))


def _by_kind(problems: Iterable[Problem]) -> Iterable[list[Problem]]:
    """Group problems with the same code and hint, in order of first occurrence; those without a code stay single."""
    kinds: dict[object, list[Problem]] = {}
    for place, problem in enumerate(problems):
        kinds.setdefault((problem.code, problem.hint) if problem.code else place, []).append(problem)
    return kinds.values()


def print_problem(problem: Problem, others: Sequence[str] = (), of: int = 1) -> None:
    """Print one problem to stderr: `error: …`, and `hint: …` below it.

    `others`: messages of the same kind, printed in between. `of`: the total number of that kind.
    """
    colors = "NO_COLOR" not in os.environ
    echo_styled("error: ", "red" if colors else None, bold=colors, newline=False, err=True)
    echo(printable(problem.message), err=True)
    for message in others:
        echo(f"{CONTINUED}{printable(message)}", err=True)
    left = of - 1 - len(others)
    if left:
        echo(f"{CONTINUED}and {left:,} more; `dataset validate --format json` lists all of them", err=True)
    if problem.hint:
        echo_styled("  hint: ", "cyan" if colors else None, newline=False, err=True)
        echo(printable(problem.hint), err=True)


def _write_traceback(error: Exception) -> Path:
    """Write the traceback to the cache folder, or to the system's temporary folder if that fails."""
    name = f"diffsynth-error-{datetime.now(UTC):%Y%m%d-%H%M%S}.log"
    text = "".join(traceback.format_exception(error))
    try:
        path = default_cache_path() / "logs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except (OSError, DiffSynthError):
        path = Path(tempfile.gettempdir()) / name
        path.write_text(text, encoding="utf-8")
    return path

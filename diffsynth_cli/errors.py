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
from diffsynth_core.errors import EXIT_FAILED, EXIT_WRONG_USE, DiffSynthError, Interrupted, Problem, truncate
from diffsynth_core.files import default_cache_path

SHOWN_OF_A_NAME = 200
HINTS_FOR_FILES = {
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ENOENT: "restore it and run the command again",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.ELOOP: "fix the symbolic links in its path",
}
"""What to do about an error of the system that names a file."""
SHOWN_OF_A_KIND = 10
"""Messages of a dataset: thousands of rows may have the same fault."""
CONTINUED = " " * len("error: ")


@dataclass(frozen=True)
class Ending:
    """How a command ended that did not do what it was asked to: its exit code, and what is told of it.

    `sentence` is told in place of problems where nothing went wrong, as after a signal.
    """

    code: int
    problems: tuple[Problem, ...] = ()
    sentence: str = ""

    def lines(self) -> Iterator[str]:
        """What is told, without colours, as it stands in the log of a run."""
        if self.sentence:
            yield self.sentence
        for problem in self.problems:
            yield f"error: {problem.message}"
            if problem.hint:
                yield f"  hint: {problem.hint}"

    def tell(self) -> None:
        """Print it on stderr."""
        if self.sentence:
            echo(self.sentence, err=True)
        print_problems(self.problems)
        if len(self.problems) > 1:
            echo(f"{len(self.problems)} problems", err=True)


def exit_code_of(error: Exception) -> int:
    """Print what went wrong on stderr; returns the exit code."""
    ending = ending_of(error)
    ending.tell()
    return ending.code


def ending_of(error: Exception, command: str = "diffsynth") -> Ending:
    """What an error is to the user; only one of ours leaves a traceback, and that in a file.

    `command`: the one that was given, whose help is offered where it was used wrongly.
    """
    if isinstance(error, Interrupted):
        return Ending(error.exit_code, sentence=_interruption(error))
    if isinstance(error, DiffSynthError):
        return Ending(error.exit_code, error.problems)
    usage = getattr(error, "format_message", None)
    if callable(usage) and str(usage()).startswith("Usage: "):
        # A command that was left out: the help says what there is.
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
"""What pydantic, which converts Typer's values, wanted instead of a text, by the type of its error."""


def _usage_problem(error: Exception, message: str, command: str) -> Problem:
    """One of Typer's own errors of use: an unknown command, an option without its value, a value of another type."""
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
    """What the system says of a file, where no command knows better: it was deleted or locked while that ran, its name
    is too long, its disk is gone."""
    name = error.filename.decode("utf-8", "surrogateescape") if isinstance(error.filename, bytes) else error.filename
    if isinstance(error, PermissionError):
        what = f"cannot open `{name}`: {error.strerror}"
        return Problem(what, "change its permissions, or remove it from the command")
    where = f"cannot access `{truncate(str(name), SHOWN_OF_A_NAME)}`" if name else "cannot write a file"
    what = f"{where}: {error.strerror}"
    return Problem(what, HINTS_FOR_FILES.get(error.errno or 0, "check the path and the disk it is on"))


def _interruption(error: Interrupted) -> str:
    """What a signal led to, as one sentence."""
    (problem,) = error.problems
    sentence = "; ".join(part for part in (problem.message, problem.hint) if part)
    return sentence[0].upper() + sentence[1:]


def lines_for_log(error: BaseException) -> Iterator[str]:
    """How a run ended, for its log: what the terminal is told, and the traceback of a fault of ours."""
    if isinstance(error, DiffSynthError):
        yield from ending_of(error).lines()
    else:
        yield f"error: {''.join(traceback.format_exception(error))}".rstrip()


def print_problems(problems: Iterable[Problem]) -> None:
    """Problems on stderr; those of a dataset by their kind, with one hint for all of a kind."""
    for kind in _by_kind(problems):
        print_problem(kind[0], [problem.message for problem in kind[1:SHOWN_OF_A_KIND]], len(kind))


def _by_kind(problems: Iterable[Problem]) -> Iterable[list[Problem]]:
    """Problems with the same code and hint together, at the place of the first of them; those without a code alone."""
    kinds: dict[object, list[Problem]] = {}
    for place, problem in enumerate(problems):
        kinds.setdefault((problem.code, problem.hint) if problem.code else place, []).append(problem)
    return kinds.values()


def print_problem(problem: Problem, others: Sequence[str] = (), of: int = 1) -> None:
    """One problem on stderr: `error: …`, and `hint: …` below it.

    `others`: messages of the same kind, which stand between. `of`: how many of that kind there are.
    """
    colours = "NO_COLOR" not in os.environ
    echo_styled("error: ", "red" if colours else None, bold=colours, newline=False, err=True)
    echo(printable(problem.message), err=True)
    for message in others:
        echo(f"{CONTINUED}{printable(message)}", err=True)
    left = of - 1 - len(others)
    if left:
        echo(f"{CONTINUED}and {left:,} more; `dataset validate --format json` lists all of them", err=True)
    if problem.hint:
        echo_styled("  hint: ", "cyan" if colours else None, newline=False, err=True)
        echo(printable(problem.hint), err=True)


def _write_traceback(error: Exception) -> Path:
    """Keep the traceback in the cache folder, else in the system's folder for temporary files."""
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

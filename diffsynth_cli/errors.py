"""Errors as the user sees them."""

import os
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import typer

from diffsynth_core.errors import EXIT_FAILED, EXIT_WRONG_USE, DiffSynthError, Interrupted, Problem
from diffsynth_core.files import default_cache_path


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
            typer.echo(self.sentence, err=True)
        for problem in self.problems:
            print_problem(problem)
        if len(self.problems) > 1:
            typer.echo(f"{len(self.problems)} problems", err=True)


def exit_code_of(error: Exception) -> int:
    """Print what went wrong on stderr; returns the exit code."""
    ending = ending_of(error)
    ending.tell()
    return ending.code


def ending_of(error: Exception) -> Ending:
    """What an error is to the user; only one of ours leaves a traceback, and that in a file."""
    if isinstance(error, Interrupted):
        return Ending(error.exit_code, sentence=_interruption(error))
    if isinstance(error, DiffSynthError):
        return Ending(error.exit_code, error.problems)
    usage = getattr(error, "format_message", None)
    if callable(usage) and str(usage()).startswith("Usage: "):
        # A command that was left out: the help says what there is.
        return Ending(EXIT_WRONG_USE, sentence=str(usage()))
    if callable(usage):
        # Typer's own errors of use: an unknown command, an option without its value.
        problem = Problem(str(usage()).rstrip("."), "`diffsynth --help` tells what there is")
        return Ending(EXIT_WRONG_USE, (problem,))
    if isinstance(error, PermissionError) and error.filename:
        what = f"the system forbids to open `{error.filename}`: {error.strerror}"
        return Ending(EXIT_FAILED, (Problem(what, "change its permissions, or leave it out"),))
    path = _write_traceback(error)
    what = f"internal error: {type(error).__name__}: {error}"
    return Ending(EXIT_FAILED, (Problem(what, f"this is a fault of diffsynth; its traceback is in `{path}`"),))


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


def print_problem(problem: Problem) -> None:
    """One problem on stderr: `error: …`, and `hint: …` below it."""
    colours = "NO_COLOR" not in os.environ
    typer.secho("error: ", fg="red" if colours else None, bold=colours, nl=False, err=True)
    typer.echo(problem.message, err=True)
    if problem.hint:
        typer.secho("  hint: ", fg="cyan" if colours else None, nl=False, err=True)
        typer.echo(problem.hint, err=True)


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

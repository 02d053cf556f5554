"""Errors as the user sees them."""

import os
import tempfile
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import typer

from diffsynth_core.errors import EXIT_FAILED, EXIT_WRONG_USE, DiffSynthError, Interrupted, Problem
from diffsynth_core.files import default_cache_path


def exit_code_of(error: Exception) -> int:
    """Print what went wrong on stderr; returns the exit code."""
    if isinstance(error, Interrupted):
        typer.echo(interruption(error), err=True)
        return error.exit_code
    if isinstance(error, DiffSynthError):
        for problem in error.problems:
            print_problem(problem)
        if len(error.problems) > 1:
            typer.echo(f"{len(error.problems)} problems", err=True)
        return error.exit_code
    usage = getattr(error, "format_message", None)
    if callable(usage) and str(usage()).startswith("Usage: "):
        # A command that was left out: the help says what there is.
        typer.echo(str(usage()), err=True)
        return EXIT_WRONG_USE
    if callable(usage):
        # Typer's own errors of use: an unknown command, an option without its value.
        print_problem(Problem(str(usage()).rstrip("."), "`diffsynth --help` tells what there is"))
        return EXIT_WRONG_USE
    if isinstance(error, PermissionError) and error.filename:
        what = f"the system forbids to open `{error.filename}`: {error.strerror}"
        print_problem(Problem(what, "change its permissions, or leave it out"))
        return EXIT_FAILED
    path = _write_traceback(error)
    print_problem(
        Problem(
            f"internal error: {type(error).__name__}: {error}",
            f"this is a fault of diffsynth; its traceback is in `{path}`",
        )
    )
    return EXIT_FAILED


def interruption(error: Interrupted) -> str:
    """What a signal led to, as one sentence: nothing went wrong, so it is not told as an error."""
    (problem,) = error.problems
    sentence = "; ".join(part for part in (problem.message, problem.hint) if part)
    return sentence[0].upper() + sentence[1:]


def lines_for_log(error: BaseException) -> Iterator[str]:
    """How a run ended, for its log: what the terminal is told, and the traceback of a fault of ours."""
    if isinstance(error, Interrupted):
        yield interruption(error)
    elif isinstance(error, DiffSynthError):
        for problem in error.problems:
            yield f"error: {problem.message}"
            if problem.hint:
                yield f"  hint: {problem.hint}"
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

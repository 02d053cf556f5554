"""Problems as values, and the exceptions that carry them.

A `Problem` is one thing that a user can fix. Small checks return lists of problems. A check that has another result
reports its problems to the enclosing `collect_problems`. `FaultsFound` carries a whole list to the error boundary of
the command line, so that all problems of a command are shown together.
"""

import difflib
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

EXIT_FAILED = 1
"""Exit code for faults in files and for failures at run time."""
EXIT_WRONG_USE = 2
"""Exit code for a wrong command: flags, parameters, recipes."""
EXIT_DOES_NOT_FIT = 3
"""Exit code if nothing is wrong but that a run does not fit in `--gpu_memory`, in a dry run or with `--fit`."""
STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a process to stop: Ctrl-C, the end of a batch job, a closed terminal."""
SIGNAL_EXIT_BASE = 128
"""A process that was ended by a signal exits with this plus the number of the signal, as in a shell."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and one thing to do about it.

    Attributes:
        message: names the file, row, key or value in backticks, what was expected and what was found.
        hint: an imperative: a flag, a command or an edit.
        wrong_use: the command itself is wrong (exit code 2), as opposed to a fault in a file (exit code 1).
        code: the finding of `dataset validate` for the same fault (data/findings.py); None if the problem
            does not concern a dataset. Problems with the same code are grouped in the report.
    """

    message: str
    hint: str | None = None
    wrong_use: bool = False
    code: str | None = None


@dataclass(frozen=True)
class DoesNotFit(Problem):
    """A run does not fit a GPU (exit code 3), whatever is changed that leaves what is trained as it is."""


class Problems(list[Problem]):
    """The problems of a block, in order.

    Attributes:
        missing: those that only say that something is absent, where they are kept apart.
    """

    def __init__(self, missing_apart: bool) -> None:
        super().__init__()
        self.missing: list[Problem] = [] if missing_apart else self


_collected: ContextVar[Problems] = ContextVar("collected problems")


@contextmanager
def collect_problems(missing_apart: bool = False) -> Iterator[Problems]:
    """Collect the problems that are reported in the block. Blocks nest: each has its own list.

    A context belongs to its thread: threads that are started in the block report nothing here.

    Args:
        missing_apart: keep what is only absent apart from what is wrong.
    """
    problems = Problems(missing_apart)
    token = _collected.set(problems)
    try:
        yield problems
    finally:
        _collected.reset(token)


def report(*problems: Problem) -> None:
    """Add problems to those of the innermost `collect_problems`.

    Raises:
        LookupError: outside of such a block, where nobody would see them.
    """
    _collected.get().extend(problems)


def report_missing(*problems: Problem) -> None:
    """Add problems that only say that something is absent, such as files that can be downloaded."""
    _collected.get().missing.extend(problems)


class DiffSynthError(Exception):
    """A failure with one clear message and, if possible, a hint."""

    exit_code = EXIT_FAILED

    def __init__(self, message: str, hint: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.problems: tuple[Problem, ...] = (Problem(message, hint, code=code),)


class FaultsFound(DiffSynthError):
    """All problems of one command, reported together."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(problem.message for problem in problems))
        self.problems = tuple(dict.fromkeys(problems))
        self.exit_code = EXIT_WRONG_USE if any(problem.wrong_use for problem in problems) else EXIT_FAILED
        if problems and all(isinstance(problem, DoesNotFit) for problem in problems):
            self.exit_code = EXIT_DOES_NOT_FIT


class Interrupted(DiffSynthError):
    """A signal stopped the run; everything worth keeping has been saved."""

    def __init__(self, signal_number: int, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.exit_code = SIGNAL_EXIT_BASE + signal_number


class OutOfTime(DiffSynthError):
    """The time of `max_time` is over; everything worth keeping has been saved, and nothing went wrong."""

    exit_code = 0


def raise_if_any(problems: Sequence[Problem]) -> None:
    """Raise all `problems` together, if there are any.

    Raises:
        FaultsFound: if `problems` is not empty.
    """
    if problems:
        raise FaultsFound(problems)


def suggest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to `name`, or None if no name is close."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return near[0] if near else None


def truncate(text: str, limit: int = 60) -> str:
    """Return `text`, cut after `limit` characters: a message must not fill the terminal."""
    return text if len(text) <= limit else f"{text[:limit]}…"


KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    type(None): "nothing",
}
"""Type of a value from a YAML or JSON file -> its name in messages."""


def kind_of(value: object) -> str:
    """Return what a value from a YAML or JSON file is, in words, for messages about unexpected types."""
    return KINDS.get(type(value), "something else")


def list_names(names: Sequence[str], limit: int = 5) -> str:
    """Return the first `limit` names in backticks, and the number of the remaining ones."""
    shown = ", ".join(f"`{name}`" for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"

"""What can go wrong, as values and as exceptions.

A `Problem` is one thing a user can fix. Checks return lists of them; `FaultsFound` carries a whole list to the one
error boundary in the command line, so that all problems of a command come in one report.
"""

import difflib
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

EXIT_FAILED = 1
EXIT_WRONG_USE = 2
EXIT_DOES_NOT_FIT = 3
"""Of a dry run: nothing is wrong, and the run does not fit in `--gpu_memory`."""
STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, the end of a job, and a terminal that goes away."""
SIGNAL_EXIT_BASE = 128
"""A shell's exit code for a program ended by a signal is this plus the signal's number."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and one thing to do about it.

    `message` names file, row, key or value in backticks, what was expected and what is there; `hint` is an imperative.
    `wrong_use` marks problems of the command itself (exit code 2) apart from faults in files (exit code 1).
    `code` names the check of `dataset validate` that finds the same (dataset_report/findings.py); None: it is none of a
    dataset. Problems of one code are reported together.
    """

    message: str
    hint: str | None = None
    wrong_use: bool = False
    code: str | None = None


class DiffSynthError(Exception):
    """A failure that has one clear message and, where there is one, a way out."""

    exit_code = EXIT_FAILED

    def __init__(self, message: str, hint: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.problems: tuple[Problem, ...] = (Problem(message, hint, code=code),)


class FaultsFound(DiffSynthError):
    """All the problems of one command, to be reported together."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(problem.message for problem in problems))
        self.problems = tuple(dict.fromkeys(problems))
        self.exit_code = EXIT_WRONG_USE if any(problem.wrong_use for problem in problems) else EXIT_FAILED


class Interrupted(DiffSynthError):
    """A signal asked the run to stop; what was worth keeping has been saved."""

    def __init__(self, signal_number: int, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.exit_code = SIGNAL_EXIT_BASE + signal_number


def raise_if_any(problems: Sequence[Problem]) -> None:
    """Raises: FaultsFound: when `problems` is not empty."""
    if problems:
        raise FaultsFound(problems)


def suggest(name: str, known: Iterable[str]) -> str | None:
    """The known name nearest to `name`, or None when nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return near[0] if near else None


def truncate(text: str, limit: int = 60) -> str:
    """A text, or its first `limit` characters where it is longer: a message must not fill the terminal."""
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
"""What YAML and JSON files hold, in words."""


def kind_of(value: object) -> str:
    """What a value from a YAML or JSON file is, for a message that something else was expected."""
    return KINDS.get(type(value), "something else")


def list_names(names: Sequence[str], limit: int = 5) -> str:
    """The first names in backticks, and how many more there are."""
    shown = ", ".join(f"`{name}`" for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"

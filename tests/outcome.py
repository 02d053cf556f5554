"""The outcome of a command line, as a value."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """How one command ended."""

    code: int
    out: str
    err: str

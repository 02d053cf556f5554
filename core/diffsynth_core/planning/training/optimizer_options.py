"""The kinds of values that arguments of optimizers take, read from text. No torch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Options = Mapping[str, Any]
"""Keyword arguments of an optimizer by name."""


@dataclass(frozen=True)
class Option:
    """What an argument accepts.

    Attributes:
        words: as in "takes …".
        read: converts the text of a value; raises ValueError if it is another one.
    """

    words: str
    read: Callable[[str], Any]


def number(at_least: float = -math.inf, below: float = math.inf, above: float = -math.inf) -> Option:
    """Return the option of a finite number within bounds."""
    bounds = [f"of at least {at_least:g}"] * (at_least > -math.inf)
    bounds += [f"above {above:g}"] * (above > -math.inf) + [f"below {below:g}"] * (below < math.inf)

    def read(text: str) -> float:
        value = float(text)
        if not (math.isfinite(value) and at_least <= value < below and value > above):
            raise ValueError
        return value

    return Option(" ".join(["a number", " and ".join(bounds)]).strip(), read)


def integer(at_least: int, below: int) -> Option:
    """Return the option of an integer within bounds."""

    def read(text: str) -> int:
        value = int(text)
        if not at_least <= value < below:
            raise ValueError
        return value

    return Option(f"an integer from {at_least} to {below - 1}", read)


def several(count: int, item: Option) -> Option:
    """Return the option of comma-separated values of one kind."""

    def read(text: str) -> tuple[Any, ...]:
        values = tuple(item.read(part) for part in text.split(","))
        if len(values) != count:
            raise ValueError
        return values

    return Option(f"{count} comma-separated values, each {item.words}", read)


def or_none(option: Option) -> Option:
    """Return an option that also takes `none`."""
    return Option(f"{option.words}, or none", lambda text: None if text.lower() == "none" else option.read(text))


def choice(*values: str) -> Option:
    """Return the option of one of several words."""

    def read(text: str) -> str:
        if text not in values:
            raise ValueError
        return text

    return Option(f"one of {', '.join(values)}", read)


def _read_switch(text: str) -> bool:
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise ValueError
    return values[text.lower()]


SWITCH = Option("true or false", _read_switch)
BETA = number(at_least=0, below=1)
"""A decay rate of an average."""
NOT_NEGATIVE = number(at_least=0)


def read_any(text: str) -> Any:
    """Return what a word looks like: none, a switch, an integer, a number, a tuple of those, or the text itself.

    For classes whose arguments no table declares.
    """
    if "," in text:
        return tuple(map(read_any, text.split(",")))
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

"""The text form of optimizer arguments: `name=value` words, such as `betas=0.9,0.99 eps=1e-8`."""

import re
from typing import Any

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def read_arguments(value: object) -> str:
    """Return arguments in their one form: words sorted by name and separated by a space.

    Args:
        value: a string of words, or a mapping of names to values, as a YAML file may have it.

    Raises:
        ValueError: if it is neither, or names an argument twice.
    """
    if isinstance(value, dict):
        words = [f"{name}={_text(argument)}" for name, argument in value.items()]
    elif isinstance(value, str):
        words = value.split()
    else:
        raise ValueError("is not a list of arguments")
    names = [word.partition("=")[0] for word in words]
    if len(set(names)) < len(names):
        raise ValueError("has an argument twice")
    if not all(NAME.fullmatch(word.partition("=")[0]) and word.partition("=")[2] for word in words):
        raise ValueError("is not a list of arguments")
    if any(re.search(r"\s", word) for word in words):
        raise ValueError("is not a list of arguments")
    return " ".join(sorted(words))


def split_arguments(text: str) -> dict[str, str]:
    """Return name -> value of arguments in their one form."""
    pairs = (word.partition("=") for word in text.split())
    return {name: value for name, _, value in pairs}


def _text(value: Any) -> str:
    """Return a value of a YAML file as the command line has it."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(_text, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)

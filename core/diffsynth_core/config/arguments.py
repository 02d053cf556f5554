"""Words of a command line that belong to no option."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.config.recipes import recipe_names
from diffsynth_core.config.unknown_names import find_unsupported, unknown_parameter
from diffsynth_core.errors import Problem, suggest

WHERE = " (command line)"
"""Suffix of messages about the command line."""


@dataclass(frozen=True)
class StrayWord(Problem):
    """A word without a flag, possibly a recipe name whose `--recipe` was forgotten."""


def unknown_arguments(words: Sequence[str]) -> list[Problem]:
    """Return the problems with words that no option consumed: unknown flags and stray words.

    The word after an unknown flag counts as the value of that flag, unless the flag is known to be a switch.
    """
    return [
        unknown_parameter(word.lstrip("-"), WHERE) if is_flag else _stray(word)
        for word, is_flag in _without_values(words)
    ]


def _without_values(words: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Yield each word that is a flag or a stray, and whether it is a flag."""
    expects_value = False
    for word in words:
        if _is_flag(word):
            name, assigned, _ = word.partition("=")
            known = find_unsupported(name.lstrip("-"))
            expects_value = not assigned and not (known and known.is_switch)
            yield name, True
        elif expects_value:
            expects_value = False
        else:
            yield word, False


def _is_flag(word: str) -> bool:
    """Return whether a word is a flag and not a negative number."""
    return word.startswith("-") and not word.lstrip("-").replace(".", "", 1).isdigit()


def _stray(word: str) -> StrayWord:
    """Return the problem of a word without a flag, with a suggested flag."""
    return StrayWord(f"`{word}`{WHERE} is not a flag or the value of one", _flag_for(word), wrong_use=True)


def _flag_for(word: str) -> str:
    path = Path(word)
    if word in recipe_names():
        return f"did you mean `--recipe {word}`?"
    if path.suffix in (".yaml", ".yml"):
        return f"did you mean `--config {word}`?"
    if path.is_dir():
        return f"did you mean `--dataset_base_path {word}`?"
    near = suggest(word, recipe_names())
    return f"did you mean `--recipe {near}`?" if near else "see `diffsynth train --help`"

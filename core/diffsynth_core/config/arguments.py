"""Words of a command line that no option takes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.config.recipes import recipe_names
from diffsynth_core.config.unknown_names import find_unsupported, unknown_parameter
from diffsynth_core.errors import Problem, suggest

WHERE = " (command line)"


@dataclass(frozen=True)
class StrayWord(Problem):
    """A word without a flag, which may have been meant to be the recipe."""


def unknown_arguments(words: Sequence[str]) -> list[Problem]:
    """The problems with words that no option took: unknown flags, and strays.

    What follows an unknown flag that may take a value is its value.
    """
    return [
        unknown_parameter(word.lstrip("-"), WHERE) if is_flag else _stray(word)
        for word, is_flag in _without_values(words)
    ]


def _without_values(words: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Each word that is a flag or a stray, and whether it is a flag."""
    takes_value = False
    for word in words:
        if _is_flag(word):
            name, assigned, _ = word.partition("=")
            known = find_unsupported(name.lstrip("-"))
            takes_value = not assigned and not (known and known.is_switch)
            yield name, True
        elif takes_value:
            takes_value = False
        else:
            yield word, False


def _is_flag(word: str) -> bool:
    """Whether a word is a flag, not a negative number."""
    return word.startswith("-") and not word.lstrip("-").replace(".", "", 1).isdigit()


def _stray(word: str) -> StrayWord:
    """The problem of a word without a flag, with the flag that it lacks where the word tells which."""
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

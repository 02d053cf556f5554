"""Shell completion from a cached table of all commands and options.

typer completes only after every module that declares an option has been imported, which takes half a second per key
press. So the commands are written to the cache folder once (`completion_table.py`), with the stamps of all source
files, and read from there until one of these files changes. Lines are parsed as typer parses them. Lines whose rules
are intricate (unknown options, `--`, joined short options) are left to typer, and so are unknown shells.

This module imports nothing slow. The output formats are those of typer's completion classes.
"""

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable

from diffsynth_cli import COMPLETION
from diffsynth_cli.remembered_commands import CommandEntry, OptionEntry, remembered_commands

LINE_VARIABLES = ("COMP_WORDS", "_TYPER_COMPLETE_ARGS")
"""Environment variables with the command line so far: of bash, and of the other shells."""
_OPTION = re.compile(r"(?<= --)[\w-]+")


class _LeftToTyper(Exception):
    """This line is not completed here."""


def complete() -> int | None:
    """Print the completions; return the exit code, or None if typer should complete this line."""
    instruction, _, shell = os.environ[COMPLETION].partition("_")
    if instruction != "complete" or shell not in _ANSWERS:
        return None
    try:
        words, incomplete = _words_so_far(shell)
        root = remembered_commands()
        if root is None:
            from diffsynth_cli.completion_table import remember_commands

            root = remember_commands()
        offers = _offers(root, words, incomplete)
    except _LeftToTyper:
        return None
    answer, code = _ANSWERS[shell](offers)
    if answer is not None:
        sys.stdout.write(f"{answer}\n")
    return code


def typed_line() -> str:
    """Return the command line to complete, with `--lora-rank` spelled `--lora_rank`, as typer's completion requires."""
    line = next((os.environ[name] for name in LINE_VARIABLES if os.environ.get(name)), "")
    return _OPTION.sub(lambda option: option[0].replace("-", "_"), line)


Offer = tuple[str, str]
"""A word and its help, which may be empty."""


def _words_so_far(shell: str) -> tuple[list[str], str]:
    """The complete words after `diffsynth`, and the word being typed."""
    line = typed_line()
    words = _split(line)
    if shell == "bash":
        at = int(os.environ["COMP_CWORD"])
        return words[1:at], words[at] if at < len(words) else ""
    if shell in ("powershell", "pwsh"):
        incomplete = os.environ.get("_TYPER_COMPLETE_WORD_TO_COMPLETE", "")
        return words[1:-1] if incomplete else words[1:], incomplete
    if len(words) > 1 and not line.endswith(" "):
        return words[1:-1], words[-1]
    return words[1:], ""


def _split(line: str) -> list[str]:
    """Split a line as a shell does; the closing quote of the last word may be missing."""
    splitter = shlex.shlex(line, posix=True)
    splitter.whitespace_split = True
    splitter.commenters = ""
    words: list[str] = []
    try:
        words.extend(splitter)
    except ValueError:
        words.append(splitter.token)
    return words


def _offers(command: CommandEntry, words: list[str], incomplete: str) -> list[Offer]:
    """What the incomplete word can be completed to."""
    while words and command["commands"]:
        name, *words = words
        if name not in command["commands"]:
            raise _LeftToTyper
        command = command["commands"][name]
    by_name = {name: option for option in command["options"] for name in option["names"]}
    if incomplete == "=":
        incomplete = ""
    elif incomplete.startswith("-") and "=" in incomplete:
        name, _, incomplete = incomplete.partition("=")
        words = [*words, name]
    given, positional = _parse(by_name, words)
    if incomplete.startswith("-"):
        free = [one for one in command["options"] if one["repeatable"] or one["names"][0] not in given]
        return [(name, one["help"]) for one in free for name in one["names"] if name.startswith(incomplete)]
    option = by_name.get(words[-1]) if words else None
    if option and not option["is_flag"]:
        return _beginning(option["values"], incomplete)
    for index, argument in enumerate(command["arguments"]):
        if argument["takes_all"] or index >= positional:
            return _beginning(argument["values"], incomplete)
    return [(name, one["help"]) for name, one in command["commands"].items() if name.startswith(incomplete)]


def _parse(options: dict[str, OptionEntry], words: Iterable[str]) -> tuple[set[str], int]:
    """The first names of the options on the line, and the number of positional words."""
    given: set[str] = set()
    positional = 0
    rest = iter(words)
    for word in rest:
        if not word.startswith("-") or word == "-":
            positional += 1
            continue
        name, equals, _ = word.partition("=")
        option = options.get(name)
        if option is None or (equals and option["is_flag"]):
            raise _LeftToTyper
        if option["is_flag"] or equals or next(rest, None) is not None:
            given.add(option["names"][0])
    return given, positional


def _beginning(values: Iterable[str], incomplete: str) -> list[Offer]:
    return [(value, "") for value in values if value.startswith(incomplete)]


def _for_bash(offers: list[Offer]) -> tuple[str, int]:
    return "\n".join(value for value, _ in offers), 0


def _for_zsh(offers: list[Offer]) -> tuple[str, int]:
    def quoted(text: str) -> str:
        for character, instead in (('"', '""'), ("'", "''"), ("$", "\\$"), ("`", "\\`"), (":", r"\\:")):
            text = text.replace(character, instead)
        return f'"{text}"'

    lines = [f"{quoted(value)}:{quoted(text)}" if text else quoted(value) for value, text in offers]
    return "_arguments '*: :(({}))'".format("\n".join(lines)) if lines else "_files", 0


def _for_fish(offers: list[Offer]) -> tuple[str | None, int]:
    """fish asks twice: whether there are completions (if not, it completes files), and which."""
    if os.environ.get("_TYPER_COMPLETE_FISH_ACTION") == "is-args":
        return None, 0 if offers else 1
    return "\n".join(f"{value}\t{text}" if text else value for value, text in offers), 0


def _for_powershell(offers: list[Offer]) -> tuple[str, int]:
    return "\n".join(f"{value}:::{text or ' '}" for value, text in offers), 0


_ANSWERS: dict[str, Callable[[list[Offer]], tuple[str | None, int]]] = {
    "bash": _for_bash,
    "zsh": _for_zsh,
    "fish": _for_fish,
    "powershell": _for_powershell,
    "pwsh": _for_powershell,
}

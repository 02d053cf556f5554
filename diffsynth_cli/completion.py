"""Answers to the Tab key, from a table of all commands and options that is remembered in the cache folder.

typer answers after importing every module that declares an option, half a second that a user waits for at each key. So
the commands are written down once (`completion_table.py`), with the stamps of all files that had a say, and read from
there until one of those files changes. A line is parsed as typer parses it; where its rules are intricate (unknown
options, `--`, joined short options) the line is left to typer, as is a shell that is not known here.

Nothing is imported that takes long. typer's classes for completion are the source of the formats.
"""

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable

from diffsynth_cli import COMPLETION
from diffsynth_cli.remembered_commands import CommandEntry, OptionEntry, remembered_commands

LINE_VARIABLES = ("COMP_WORDS", "_TYPER_COMPLETE_ARGS")
"""Those that hold the line so far: bash's, and that of other shells."""
_OPTION = re.compile(r"(?<= --)[\w-]+")


class _LeftToTyper(Exception):
    """This line is not answered here."""


def complete() -> int | None:
    """Answer the shell on stdout; returns the exit code, or None where typer is to answer."""
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
    """The line that a shell asks about; typer knows options by their names alone: `--lora-rank` is `--lora_rank`."""
    line = next((os.environ[name] for name in LINE_VARIABLES if os.environ.get(name)), "")
    return _OPTION.sub(lambda option: option[0].replace("-", "_"), line)


# --- what is offered -------------------------------------------------------------------------------------------------


Offer = tuple[str, str]
"""A word, and its line of help: empty where it has none."""


def _words_so_far(shell: str) -> tuple[list[str], str]:
    """The complete words behind `diffsynth`, and the one that is being typed."""
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
    """The words of a line as a shell would make them, the last one perhaps without its closing quote."""
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
    """What may stand in place of the incomplete word."""
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
    """The first names of the options that are given, and how many words are none of options."""
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


# --- as each shell reads it ------------------------------------------------------------------------------------------


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
    """fish asks twice: whether there is anything (else it offers files), and what."""
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

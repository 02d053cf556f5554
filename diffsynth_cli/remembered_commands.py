"""The table of commands in the cache folder that completions are answered from. Nothing slow is imported."""

import json
import os
import sys
import zlib
from pathlib import Path
from typing import NotRequired, TypedDict

from diffsynth_core.cache_folder import cache_folder


class OptionEntry(TypedDict):
    names: list[str]
    help: str
    is_flag: bool
    repeatable: bool
    values: list[str]
    """Those that are offered; none where the shell may offer files."""


class ArgumentEntry(TypedDict):
    values: list[str]
    takes_all: bool
    """Whether it takes any number of words."""


class CommandEntry(TypedDict):
    help: str
    options: list[OptionEntry]
    arguments: list[ArgumentEntry]
    commands: dict[str, "CommandEntry"]


class Table(TypedDict):
    stamps: dict[str, list[int]]
    """By file or folder: size in bytes, and modification time in nanoseconds."""
    root: NotRequired[CommandEntry]


def table_path() -> Path | None:
    """The file of this installation's table; None where there is no place for one."""
    folder = cache_folder()
    installation = f"{Path(__file__).parent} {sys.version}".encode()
    return folder and folder / "completion" / f"{zlib.crc32(installation):08x}.json"


def remembered_commands() -> CommandEntry | None:
    """The commands as they were written down, unless a file that had a say in them has changed since."""
    path = table_path()
    try:
        table: Table = json.loads(path.read_bytes()) if path else {"stamps": {}}
        if all(file_stamp(source) == stamp for source, stamp in table["stamps"].items()):
            return table.get("root")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass  # there is none, or it is damaged
    return None


def file_stamp(path: str) -> list[int]:
    """Size in bytes and modification time in nanoseconds: another stamp means another content."""
    facts = os.stat(path)  # noqa: PTH116 -- some fifty of them, at each key
    return [facts.st_size, facts.st_mtime_ns]

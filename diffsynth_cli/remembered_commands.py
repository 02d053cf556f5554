"""The cached table of commands for shell completion. This module imports nothing slow."""

import json
import os
import sys
import zlib
from pathlib import Path
from typing import NotRequired, TypedDict

from diffsynth_core.cache_folder import cache_folder


class OptionEntry(TypedDict):
    """An option of a command."""

    names: list[str]
    help: str
    is_flag: bool
    repeatable: bool
    values: list[str]
    """Values to offer; empty if the shell should complete files."""


class ArgumentEntry(TypedDict):
    """An argument of a command."""

    values: list[str]
    takes_all: bool
    """Whether it accepts any number of words."""


class CommandEntry(TypedDict):
    """A command or a group of commands."""

    help: str
    options: list[OptionEntry]
    arguments: list[ArgumentEntry]
    commands: dict[str, "CommandEntry"]


class Table(TypedDict):
    """The completion table."""

    stamps: dict[str, list[int]]
    """Source file or folder -> size in bytes, modification time in nanoseconds."""
    root: NotRequired[CommandEntry]


def table_path() -> Path | None:
    """Return the file for the table of this installation; None if there is no cache folder."""
    folder = cache_folder()
    installation = f"{Path(__file__).parent} {sys.version}".encode()
    return folder and folder / "completion" / f"{zlib.crc32(installation):08x}.json"


def remembered_commands() -> CommandEntry | None:
    """Return the cached commands; None if there are none, or if a source file has changed since."""
    path = table_path()
    try:
        table: Table = json.loads(path.read_bytes()) if path else {"stamps": {}}
        if all(file_stamp(source) == stamp for source, stamp in table["stamps"].items()):
            return table.get("root")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass  # missing or damaged
    return None


def file_stamp(path: str) -> list[int]:
    """Return size in bytes and modification time in nanoseconds, which change with the content."""
    facts = os.stat(path)  # noqa: PTH116 -- some fifty files per key press
    return [facts.st_size, facts.st_mtime_ns]

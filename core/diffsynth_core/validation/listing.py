"""The files of a dataset's folder, listed once; links are never followed out of it. No torch."""

import os
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Listing:
    """The files below a folder by their paths relative to it, with `/` between folders, and their sizes in bytes.

    `links`: those that are links, or lie behind one, to files within the folder. `leaving`: links to somewhere else,
    and links to nothing; what they lead to has not been opened.
    """

    base: Path
    files: dict[str, int] = field(default_factory=dict)
    links: frozenset[str] = frozenset()
    leaving: frozenset[str] = frozenset()

    @cached_property
    def by_letters(self) -> dict[str, str]:
        """Paths by what is left of them when case and the composition of accents are passed over."""
        return {letters(name): name for name in self.files}

    @cached_property
    def _by_folder(self) -> dict[str, list[str]]:
        folders: dict[str, list[str]] = {}
        for name in self.files:
            folders.setdefault(name.rpartition("/")[0], []).append(name)
        return folders

    def in_folder(self, folder: str) -> list[str]:
        """The paths of the files that lie in `folder` itself."""
        return self._by_folder.get(folder, [])


def letters(name: str) -> str:
    """What two paths share that differ only in case or in how accents are composed."""
    return unicodedata.normalize("NFC", name).casefold()


def list_files(base: Path) -> Listing:
    """Every file below a folder."""
    files: dict[str, int] = {}
    links: set[str] = set()
    leaving: set[str] = set()
    root = os.path.realpath(base)
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(base / folder) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_symlink():
                    _take_link(root, name, entry.path, files, links, leaving)
                elif entry.is_dir():
                    folders.append(name)
                elif entry.is_file():
                    files[name] = entry.stat().st_size
    return Listing(base, files, frozenset(links), frozenset(leaving))


def list_named(base: Path, names: Iterable[str]) -> Listing:
    """The files in the folders of `names` (paths relative to `base`), and nothing of the other folders."""
    files: dict[str, int] = {}
    links: set[str] = set()
    leaving: set[str] = set()
    root = os.path.realpath(base)
    for folder in dict.fromkeys(name.rpartition("/")[0] for name in names if not name.startswith(("/", "../"))):
        parts = folder.split("/")
        above = ["/".join(parts[: depth + 1]) for depth in range(len(parts))] if folder else []
        link = next((part for part in above if (base / part).is_symlink()), None)
        if link:
            leaving.add(link)
            continue
        with suppress(OSError, ValueError), os.scandir(base / folder) as entries:  # told where its files are missed
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_symlink():
                    _take_link(root, name, entry.path, files, links, leaving)
                elif entry.is_file():
                    files[name] = entry.stat().st_size
    return Listing(base, files, frozenset(links), frozenset(leaving))


def _take_link(root: str, name: str, path: str, files: dict[str, int], links: set[str], leaving: set[str]) -> None:
    """Sort a link in; one to a folder counts as leaving, for following it could go round for ever."""
    target = os.path.realpath(path)
    if os.path.commonpath([root, target]) == root and os.path.isfile(target):  # noqa: PTH113 - a path of os.scandir
        files[name] = os.stat(target).st_size  # noqa: PTH116
        links.add(name)
    else:
        leaving.add(name)

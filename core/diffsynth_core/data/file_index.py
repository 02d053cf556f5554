"""Index of the files in a dataset's folder; links out of it are never followed. No torch."""

import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from diffsynth_core.data.formats import leftover_folder


@dataclass(frozen=True)
class Listing:
    """The files below a folder by relative path, with `/` between folders, and their sizes in bytes.

    Attributes:
        links: links to files within the folder -> path of that file.
        leaving: links to elsewhere or to nothing, which have not been opened.
        unread: folders that cannot be opened -> the system's reason.
        leftover_folders: folders of systems and programs, which are not searched -> the program.
    """

    base: Path
    files: dict[str, int] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    leaving: frozenset[str] = frozenset()
    unread: Mapping[str, str] = field(default_factory=dict)
    leftover_folders: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def by_letters(self) -> dict[str, str]:
        """Return paths by their form without case and accent composition."""
        return {letters(name): name for name in self.files}

    @cached_property
    def _by_composition(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.files:
            found.setdefault(unicodedata.normalize("NFC", name), []).append(name)
        return found

    def find(self, name: str) -> str | None:
        """Return the file that `name` in a row denotes, or None.

        That is the file of exactly this name, of this name without surrounding spaces, or the only one whose accents
        are composed differently.
        """
        stripped = name.strip()
        if name in self.files or stripped in self.files:
            return name if name in self.files else stripped
        alike = self._by_composition.get(unicodedata.normalize("NFC", stripped), [])
        return alike[0] if len(alike) == 1 else None

    @cached_property
    def _by_folder(self) -> dict[str, list[str]]:
        folders: dict[str, list[str]] = {}
        for name in self.files:
            folders.setdefault(name.rpartition("/")[0], []).append(name)
        return folders

    def in_folder(self, folder: str) -> list[str]:
        """Return the paths of the files directly in `folder`."""
        return self._by_folder.get(folder, [])


def letters(name: str) -> str:
    """Return a form that is equal for paths that differ only in case, accent composition, or surrounding spaces."""
    return unicodedata.normalize("NFC", name.strip()).casefold()


def list_files(base: Path, needed: Iterable[str] = ()) -> Listing:
    """List every file below a folder, except for folders that systems and programs leave behind.

    Args:
        needed: relative paths whose folders are listed anyway.

    Raises:
        OSError: if the folder itself cannot be opened; for its subfolders, the error is stored in `unread`.
    """
    lister = _Lister(base)
    named = {folder for name in needed for folder in _folders_above(name)}
    folders = [""]
    while folders:
        folder = folders.pop()
        whose = leftover_folder(folder.rpartition("/")[2])
        if whose and folder not in named:
            lister.leftover_folders[folder] = whose
            continue
        try:
            folders += lister.take_folder(folder)
        except OSError as error:
            if not folder:
                raise
            lister.unread[folder] = str(error.strerror)
    return lister.listing()


def _folders_above(name: str) -> Iterator[str]:
    parts = name.split("/")
    return ("/".join(parts[:depth]) for depth in range(1, len(parts)))


def list_named(base: Path, names: Iterable[str]) -> Listing:
    """List the files in the folders of `names` (paths relative to `base`) only."""
    lister = _Lister(base)
    within = [name for name in names if not name.startswith(("/", "../"))]
    # A name with backslashes is reported as missing, with the file that it may mean.
    within += [name.replace("\\", "/") for name in within if "\\" in name]
    for folder in dict.fromkeys(name.rpartition("/")[0] for name in within):
        parts = folder.split("/")
        above = ["/".join(parts[: depth + 1]) for depth in range(len(parts))] if folder else []
        link = next((part for part in above if (base / part).is_symlink()), None)
        if link:
            lister.leaving.add(link)
            continue
        try:
            lister.take_folder(folder)
        except FileNotFoundError:
            with suppress(OSError):
                lister.take_folder(_as_composed(base, parts))
        except PermissionError as error:
            lister.unread[folder] = str(error.strerror)
        except (OSError, ValueError):  # reported where its files are missing
            continue
    return lister.listing()


def _as_composed(base: Path, parts: Sequence[str]) -> str:
    """Return a folder with accents composed as on the disk; links are not followed.

    Raises:
        FileNotFoundError: if there is no such folder, or several.
    """
    found = ""
    for part in parts:
        with os.scandir(base / found) as entries:
            folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        alike = [name for name in folders if unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", part)]
        if part not in folders and len(alike) != 1:
            raise FileNotFoundError(base / found / part)
        found += ("/" if found else "") + (part if part in folders else alike[0])
    return found


class _Lister:
    """Builds a listing."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._root = os.path.realpath(base)
        self._files: dict[str, int] = {}
        self._links: dict[str, str] = {}
        self.leaving: set[str] = set()
        self.unread: dict[str, str] = {}
        self.leftover_folders: dict[str, str] = {}

    def take_folder(self, folder: str) -> list[str]:
        """Add the files of a folder, and return its subfolders.

        Raises:
            OSError: if it cannot be opened.
        """
        folders = []
        with os.scandir(self._base / folder) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                with suppress(FileNotFoundError):  # gone since
                    if entry.is_symlink():
                        self._take_link(name, entry.path)
                    elif entry.is_dir():
                        folders.append(name)
                    elif entry.is_file():
                        self._files[name] = entry.stat().st_size
        return folders

    def _take_link(self, name: str, path: str) -> None:
        """Add a link; one to a folder counts as leaving, because following it could loop."""
        target = os.path.realpath(path)
        if os.path.commonpath([self._root, target]) == self._root and os.path.isfile(target):  # noqa: PTH113 - a path of os.scandir
            self._files[name] = os.stat(target).st_size  # noqa: PTH116
            self._links[name] = os.path.relpath(target, self._root).replace(os.sep, "/")
        else:
            self.leaving.add(name)

    def listing(self) -> Listing:
        """Return the listing."""
        return Listing(
            self._base, self._files, self._links, frozenset(self.leaving), self.unread, self.leftover_folders
        )

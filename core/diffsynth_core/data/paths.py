"""Paths in rows, looked up in the listing of the folder: findings PATH_MISSING to URL. No torch.

Nothing outside the dataset is opened.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unicodedata import normalize

from diffsynth_core.data.file_index import Listing, letters
from diffsynth_core.data.findings import Finding, Level, finding
from diffsynth_core.data.formats import kind_of_name
from diffsynth_core.data.records import Record
from diffsynth_core.errors import suggest, truncate

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
"""Start of a URL."""
WINDOWS_ROOT = re.compile(r"[A-Za-z]:[\\/]|\\\\")
"""Start of an absolute Windows path."""
SUGGESTED = 20
"""Maximum number of suggestions."""
SUGGESTED_FROM = 2000
"""Maximum number of files to search for similar names, because comparing names is slow."""
SHOWN_OF_A_PATH = 200
"""Maximum number of characters of a path in a message: a cell may contain a caption instead."""
WRITE_SLASHES = "use `/` between folders"
"""Hint for backslashes."""


@dataclass(frozen=True)
class _Fault:
    code: str
    what: str
    hint: str


def present_paths(records: Sequence[Record], listing: Listing) -> tuple[frozenset[str], list[Finding]]:
    """Return the paths that can be opened, and URL, PATH_OUTSIDE, PATH_CASE and PATH_MISSING for the others."""
    named = frozenset(name for record in records for names in record.files.values() for name in names)
    present: set[str] = set()
    findings: list[Finding] = []
    for record in records:
        for column, names in record.files.items():
            for name in names:
                if name in present:
                    continue
                fault = _fault(name, listing, len(findings) < SUGGESTED, named)
                if fault is None:
                    present.add(name)
                else:
                    shown = truncate(name, SHOWN_OF_A_PATH)
                    what = f"row {record.row}: column `{column}` names `{shown}`, {fault.what}"
                    findings.append(finding(fault.code, what, fault.hint, row=record.row, path=name))
    return frozenset(present), findings


def _fault(name: str, listing: Listing, near: bool, named: frozenset[str]) -> _Fault | None:
    """Return why a path is not opened; `near`: whether to suggest a similar one that is not `named` itself."""
    if name in listing.files:
        return None
    if ADDRESS.match(name):
        return _Fault("URL", "a URL", "download the file and use its path")
    if name.startswith("/") or WINDOWS_ROOT.match(name):
        return _Fault("PATH_OUTSIDE", "which is absolute", "make it relative to the dataset folder")
    if name == ".." or name.startswith("../"):
        return _Fault("PATH_OUTSIDE", "which is outside the dataset", "move the file into the dataset")
    leaving = next((link for link in listing.leaving if name == link or name.startswith(f"{link}/")), None)
    if leaving:
        return _Fault("PATH_OUTSIDE", f"a link to outside the dataset (`{leaving}`)", "replace the link with the file")
    unread = next((folder for folder in listing.unread if name.startswith(f"{folder}/")), None)
    if unread:
        return _Fault("PATH_MISSING", f"in the folder `{unread}`, which is not readable", "check its permissions")
    return _missing(name, listing, near, named)


def _missing(name: str, listing: Listing, near: bool, named: frozenset[str]) -> _Fault:
    other = listing.by_letters.get(letters(name))
    if other:
        return _Fault("PATH_CASE", f"but the file on disk is {_spelled(other, name)}", "use the exact file name")
    if "\\" in name and listing.find(name.replace("\\", "/")):
        return _Fault("PATH_MISSING", "which does not exist: it uses `\\` between folders", WRITE_SLASHES)
    meant = _meant(name, listing.in_folder(name.rpartition("/")[0]), named) if near else None
    if meant:
        return _Fault("PATH_MISSING", "which does not exist", f"did you mean `{meant}`?")
    reads_as_caption = " " in name and kind_of_name(name) not in ("image", "clip")
    hint = (
        "write a file name here: this looks like a caption"
        if reads_as_caption
        else f"correct the path (relative to `{listing.base}`)"
    )
    return _Fault("PATH_MISSING", "which does not exist", hint)


def _spelled(other: str, name: str) -> str:
    """Return a path on disk, escaped if it looks the same as `name`."""
    alike = normalize("NFC", other) == normalize("NFC", name)
    if alike:
        return f"one of several files of this name, such as `{other}`, with other combining characters"
    return f"`{other}`, with leading or trailing spaces in its name" if other.strip() == name else f"`{other}`"


def _meant(name: str, there: list[str], named: frozenset[str]) -> str | None:
    """Return the file in its folder that a path may mean: names are compared without suffixes, which many files
    share.
    """
    stems = {os.path.splitext(one)[0]: one for one in there if one not in named}  # noqa: PTH122 - relative names
    meant = suggest(os.path.splitext(name)[0], stems) if len(stems) <= SUGGESTED_FROM else None  # noqa: PTH122
    return stems[meant] if meant else None


def unread_folders(listing: Listing, captions_in_files: bool) -> Iterator[Finding]:
    """Yield FOLDER_UNREADABLE; an error if each media file is a row, because captions are next to them."""
    for folder, reason in sorted(listing.unread.items()):
        what = f"the folder `{folder}` cannot be read: {reason}"
        hint = "check its permissions, or move it out of the dataset"
        level: Level = "error" if captions_in_files else "warning"
        yield finding("FOLDER_UNREADABLE", what, hint, path=folder, level=level)


def as_on_disk(records: Sequence[Record], listing: Listing) -> tuple[Record, ...]:
    """Return the rows with file names spelled as on disk: without surrounding spaces, accents composed as there."""
    return tuple(
        record
        if all(name in listing.files for names in record.files.values() for name in names)
        else record._replace(
            files={
                column: tuple(listing.find(name) or name.strip() for name in names)
                for column, names in record.files.items()
            }
        )
        for record in records
    )

"""Codes of paths: PATH_MISSING to URL. Paths are looked up in the listing; nothing that leaves the dataset is opened.
No torch.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from diffsynth_core.data.metadata import CAPTION_ENDING, ENDINGS, SHOWN_OF_A_PATH
from diffsynth_core.errors import beginning, suggest
from diffsynth_core.validation.examined import Examined
from diffsynth_core.validation.findings import Finding, Level, found
from diffsynth_core.data.listing import Listing, letters

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
WINDOWS_ROOT = re.compile(r"[A-Za-z]:[\\/]|\\\\")
SUGGESTED = 20
SUGGESTED_FROM = 2000
"""Near names are looked for so many times, and among so many files: comparing names is slow."""
MEDIA_ENDINGS = frozenset(ending for endings in ENDINGS.values() for ending in endings)


@dataclass(frozen=True)
class _Fault:
    code: str
    what: str
    hint: str


def present_paths(examined: Examined) -> tuple[frozenset[str], list[Finding]]:
    """The paths that can be opened, and URL, PATH_OUTSIDE, PATH_CASE and PATH_MISSING for the others."""
    listing = examined.listing
    assert listing is not None
    named = _named(examined)
    present: set[str] = set()
    findings: list[Finding] = []
    for record in examined.records:
        for column, names in record.files.items():
            for name in names:
                if name in present:
                    continue
                fault = _fault(name, listing, len(findings) < SUGGESTED, named)
                if fault is None:
                    present.add(name)
                else:
                    what = (
                        f"row {record.row}: column `{column}` names `{beginning(name, SHOWN_OF_A_PATH)}`, {fault.what}"
                    )
                    findings.append(found(fault.code, what, fault.hint, row=record.row, path=name))
    return frozenset(present), findings


def _fault(name: str, listing: Listing, near: bool, named: frozenset[str]) -> _Fault | None:
    """Why a path is not opened; `near`: whether to look for one that may have been meant, and is not `named` itself."""
    if name in listing.files:
        return None
    if ADDRESS.match(name):
        return _Fault("URL", "an address", "download the file and name it")
    if name.startswith("/") or WINDOWS_ROOT.match(name):
        return _Fault("PATH_OUTSIDE", "which is absolute", "write it relative to the folder of the dataset")
    if name == ".." or name.startswith("../"):
        return _Fault("PATH_OUTSIDE", "which leads out of the dataset", "move the file into the dataset")
    leaving = next((link for link in listing.leaving if name == link or name.startswith(f"{link}/")), None)
    if leaving:
        return _Fault("PATH_OUTSIDE", f"a link that leads out of the dataset (`{leaving}`)", "copy the file itself")
    unread = next((folder for folder in listing.unread if name.startswith(f"{folder}/")), None)
    if unread:
        return _Fault("PATH_MISSING", f"in the folder `{unread}`, which cannot be opened", "let the folder be read")
    return _missing(name, listing, near, named)


def _missing(name: str, listing: Listing, near: bool, named: frozenset[str]) -> _Fault:
    other = listing.by_letters.get(letters(name))
    if other:
        return _Fault("PATH_CASE", f"where the disk has `{other}`", "write it as the disk does")
    if name.replace("\\", "/") in listing.files:
        return _Fault("PATH_MISSING", "which is not there", "write `/` between folders")
    meant = _meant(name, listing.in_folder(name.rpartition("/")[0]), named) if near else None
    if meant:
        return _Fault("PATH_MISSING", "which is not there", f"did you mean `{meant}`?")
    reads_as_caption = " " in name and os.path.splitext(name)[1].lower() not in MEDIA_ENDINGS  # noqa: PTH122 - a relative name
    hint = (
        "name a file here: this reads as a caption"
        if reads_as_caption
        else f"correct the path (relative to `{listing.base}`)"
    )
    return _Fault("PATH_MISSING", "which is not there", hint)


def _meant(name: str, there: list[str], named: frozenset[str]) -> str | None:
    """The file of its folder that a path may mean: names are compared without their endings, which many files share."""
    stems = {os.path.splitext(one)[0]: one for one in there if one not in named}  # noqa: PTH122 - relative names
    meant = suggest(os.path.splitext(name)[0], stems) if len(stems) <= SUGGESTED_FROM else None  # noqa: PTH122
    return stems[meant] if meant else None


def _named(examined: Examined) -> frozenset[str]:
    """The paths that rows name."""
    return frozenset(name for record in examined.records for names in record.files.values() for name in names)


def check_folders(examined: Examined) -> Iterator[Finding]:
    """FOLDER_UNREADABLE."""
    for folder, reason in sorted(examined.listing.unread.items() if examined.listing else ()):
        what = f"the folder `{folder}` cannot be opened: {reason}"
        hint = "let it be read, or move it out of the dataset"
        level: Level = "error" if examined.table.beside else "warning"
        yield found("FOLDER_UNREADABLE", what, hint, path=folder, level=level)


def check_unreferenced(examined: Examined) -> Iterator[Finding]:
    """FILE_UNREFERENCED: media that no row names, and captions beside no file."""
    listing = examined.listing
    if listing is None or not examined.records:
        return
    named = _named(examined)
    used = named | {listing.links[name] for name in named if name in listing.links}
    captions = {f"{os.path.splitext(name)[0]}{CAPTION_ENDING}" for name in named} if examined.table.beside else set()  # noqa: PTH122 - a relative name
    endings = MEDIA_ENDINGS | ({CAPTION_ENDING} if examined.table.beside else set())
    for name in sorted(listing.files.keys() - used - captions):
        ending = os.path.splitext(name)[1].lower()  # noqa: PTH122
        if ending == CAPTION_ENDING in endings:
            hint = "put its file beside it, in a format that is read, or move it away"
            yield found("FILE_UNREFERENCED", f"`{name}` is a caption without a file", hint, path=name)
        elif ending in endings and examined.table.beside:
            what = f"`{name}` is not used: {examined.rules.kind}s are trained on"
            yield found("FILE_UNREFERENCED", what, "move it away, or name the recipe that it is for", path=name)
        elif ending in endings:
            yield found("FILE_UNREFERENCED", f"no row names `{name}`", "write a row for it, or move it away", path=name)

"""Rows of a folder without a metadata file: its media files, with captions in text files next to them. No torch."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from diffsynth_core.data.captioned_folder import (
    CaptionedFolder,
    expected_caption,
    leftovers_note,
    unsupported_problem,
)
from diffsynth_core.data.file_index import Listing
from diffsynth_core.data.findings import Finding, Level, finding
from diffsynth_core.data.formats import kind_of_name
from diffsynth_core.data.texts import SAVE_AS_UTF8, likely_encoding, read_caption
from diffsynth_core.errors import list_names


def read_folder_rows(
    listing: Listing, folder: CaptionedFolder, text_column: str, media_column: str, kind: str, metadata_names: str
) -> tuple[dict[int, Mapping[str, str]], list[Finding]]:
    """Return one row per image or, for the kind `video`, per video and image; rows without a caption lack that column.

    Args:
        metadata_names: metadata files that the folder might have had, for the message about an empty folder.
    """
    findings = [*_links_out(listing), *_check_folder(folder, kind)]
    if not folder.rows:
        what = f"`{listing.base}` contains neither {metadata_names} nor {kind}s"
        hint = f"write a metadata.csv with the columns `{media_column}` and `{text_column}`"
        empty = [] if any(one.level == "error" for one in findings) else [finding("EMPTY", what, hint)]
        return {}, [*findings, *empty]
    rows: dict[int, Mapping[str, str]] = {}
    for number, (name, captions) in enumerate(folder.rows.items(), start=1):
        text = _read_caption_of(name, captions, number, listing)
        if isinstance(text, Finding):
            findings.append(text)
        rows[number] = {media_column: name} if isinstance(text, Finding) else {media_column: name, text_column: text}
    numbers = {name: number for number, name in enumerate(folder.rows, start=1)}
    for first, second, caption in folder.shared_captions():
        what = f"`{first}` and `{second}` share the caption file `{caption}`"
        hint = "move one of them, or write a metadata.csv"
        findings.append(finding("STEM_COLLISION", what, hint, row=numbers[second], path=second))
    return rows, findings


def _read_caption_of(name: str, captions: tuple[str, ...], row: int, listing: Listing) -> str | Finding:
    """Return the caption of an image or clip, or the finding that explains why there is none."""
    if len(captions) > 1:
        what = f"`{name}` has {len(captions)} caption files: {list_names(captions)}"
        return finding("CAPTION_AMBIGUOUS", what, "keep one of them", row=row, path=name)
    if not captions:
        caption = expected_caption(name)
        if caption in listing.leaving:
            return _leads_out(caption, row)
        what = f"`{name}` has no caption: `{caption}` is missing"
        hint = "write the caption to a .txt file of the same name, or all captions to a metadata.csv"
        return finding("CAPTION_MISSING", what, hint, row=row, path=name)
    try:
        return read_caption(listing.base / captions[0])
    except UnicodeDecodeError as error:
        what = f"`{Path(captions[0])}` is not UTF-8 (byte {error.start}){likely_encoding(error)}"
        return finding("NOT_UTF8", what, SAVE_AS_UTF8, row=row, path=captions[0])
    except OSError as error:
        what = f"`{captions[0]}` cannot be read: {error.strerror}"
        return finding("PATH_MISSING", what, "check its permissions", row=row, path=captions[0])


def _check_folder(folder: CaptionedFolder, kind: str) -> Iterator[Finding]:
    """Yield findings about files of a folder that are not samples."""
    for names, captioned in ((folder.captioned_unsupported, True), (folder.unsupported, False)):
        for name in names:
            problem = unsupported_problem((name,), captioned)
            level: Level | None = "error" if captioned else None
            yield finding("FORMAT_UNSUPPORTED", problem.message, problem.hint, path=name, level=level)
    for name in folder.other_media:
        what = f"`{name}` is not used: training uses {kind}s"
        yield finding(
            "FILE_UNREFERENCED", what, "move it out of the dataset, or pass the recipe that it is for", path=name
        )
    for name in folder.lone_captions:
        hint = "add its media file in a supported format, or move it out of the dataset"
        yield finding("FILE_UNREFERENCED", f"`{name}` is a caption file without an image or clip", hint, path=name)
    for name in folder.unknown:
        what = f"`{name}` is not read: not an image, clip or caption"
        yield finding("FILE_UNKNOWN", what, "move it out of the dataset if it does not belong there", path=name)
    if folder.leftovers:
        yield finding("FILE_LEFTOVER", leftovers_note(folder.leftovers))


def _links_out(listing: Listing) -> Iterator[Finding]:
    """Yield PATH_OUTSIDE: an error for links that would be rows, a warning for links to folders and other files."""
    for name in sorted(listing.leaving):
        kind = kind_of_name(name)
        if kind in ("image", "clip"):
            yield _leads_out(name, None)
        elif kind is None:
            yield _leads_out(name, None, "warning")


def _leads_out(name: str, row: int | None, level: Level | None = None) -> Finding:
    what = f"`{name}` is a link to outside the dataset"
    hint = "replace the link with the file" if level is None else "replace the link with its target, or remove it"
    return finding("PATH_OUTSIDE", what, hint, row=row, path=name, level=level)

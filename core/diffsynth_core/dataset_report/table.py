"""Metadata read as far as it can be: what cannot becomes findings, and the rest is checked all the same. No torch."""

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth_core.data.captioned_folder import (
    CaptionedFolder,
    expected_caption,
    leftovers_note,
    sort_folder,
    unsupported_problem,
)
from diffsynth_core.data.file_index import Listing
from diffsynth_core.data.formats import kind_of_name
from diffsynth_core.data.metadata import (
    METADATA_NAMES,
    SAVE_AS_UTF8,
    UNREAD_NAMES,
    csv_problem,
    json_problem,
    not_utf8,
    other_separator,
    repeated_column,
    rival_captions,
    shared_caption,
    split_row,
    unnamed_column,
)
from diffsynth_core.data.texts import decode_text, likely_encoding, read_caption
from diffsynth_core.dataset_report.findings import Finding, Level, finding
from diffsynth_core.dataset_report.rules import TARGET_COLUMNS, Rules
from diffsynth_core.errors import Problem, kind_of
from diffsynth_core.json_files import InvalidJson, parse_json


@dataclass(frozen=True)
class Table:
    """The rows of a dataset by their numbers, which count samples from 1 as training does.

    `origin`: where they were read. `base`: the folder that paths are relative to. Rows that cannot be parsed are left
    out. `beside`: captions stand in text files beside the media.
    """

    origin: str
    base: Path
    columns: tuple[str, ...]
    rows: Mapping[int, Mapping[str, Any]]
    beside: bool = False


def read_table(base: Path, metadata: Path | None, rules: Rules, listing: Listing) -> tuple[Table, list[Finding]]:
    """The rows of a dataset, and what was found where they could not be read.

    `listing` is looked into where captions stand beside the files.
    """
    if metadata is None:
        return _read_beside(base, rules, listing)
    empty = Table(str(metadata), base, (), {})
    try:
        text = decode_text(metadata.read_bytes())
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        what = f"`{metadata}` line {line} is not UTF-8 (byte {error.start}){likely_encoding(error)}"
        return empty, [finding("NOT_UTF8", what, SAVE_AS_UTF8, path=metadata.name)]
    columns, rows, findings = READERS[metadata.suffix.lower()](metadata, text)
    if not rows and not findings:
        findings = [finding("EMPTY", f"`{metadata}` has no rows", "add one row per sample", path=metadata.name)]
    return Table(str(metadata), base, columns, rows), findings


_Read = tuple[tuple[str, ...], dict[int, Mapping[str, Any]], list[Finding]]
"""Columns, rows by number, and what could not be read."""


def _read_csv(path: Path, text: str) -> _Read:
    separated = other_separator(path, text)
    if separated:
        return (), {}, [finding("PARSE_ERROR", separated.message, separated.hint, path=path.name)]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: dict[int, Mapping[str, Any]] = {}
    findings: list[Finding] = []
    header: tuple[str, ...] = ()
    unnamed: dict[int, Problem] = {}
    number, line = 0, 1
    try:
        header = tuple(name.strip() for name in next(reader, []))
        twice = repeated_column(header)
        if twice:
            what = f"`{path}` has the column `{twice}` twice"
            findings.append(finding("PARSE_ERROR", what, "rename one of them", path=path.name))
        width = len(header)
        line = reader.line_num + 1
        for cells in reader:
            line = reader.line_num + 1
            if not cells:
                continue
            number += 1
            split = split_row(header, cells)
            if split is None:
                what = f"`{path}` line {reader.line_num}: {len(cells)} cells, but the header has {width}"
                hint = "quote values that contain commas"
                findings.append(finding("PARSE_ERROR", what, hint, row=number, path=path.name))
                continue
            rows[number], place = split
            if place and place not in unnamed:
                unnamed[place] = unnamed_column(str(path), place, cells[place - 1])
    except csv.Error as error:
        problem = csv_problem(path, error, line, reader.line_num)
        what = f"{problem.message}; nothing after it was read"
        findings.append(finding("PARSE_ERROR", what, problem.hint, path=path.name))
    findings += [finding("COLUMN_UNKNOWN", one.message, one.hint, path=path.name) for one in unnamed.values()]
    return tuple(filter(None, header)), rows, findings


def _read_json(path: Path, text: str) -> _Read:
    try:
        content = parse_json(text, finite=False)
    except InvalidJson as error:
        problem = json_problem(path, error)
        return (), {}, [finding("PARSE_ERROR", problem.message, problem.hint, path=path.name)]
    if not isinstance(content, list):
        what = f"`{path}` holds {kind_of(content)}, expected a list of objects"
        return (), {}, [finding("PARSE_ERROR", what, "write one object per sample", path=path.name)]
    return _from_objects(path, dict(enumerate(content, start=1)), [])


def _read_jsonl(path: Path, text: str) -> _Read:
    objects: dict[int, Any] = {}
    findings: list[Finding] = []
    number = 0
    for line_number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        number += 1
        try:
            objects[number] = parse_json(line, finite=False)
        except InvalidJson as error:
            problem = json_problem(path, error, line_number)
            findings.append(finding("PARSE_ERROR", problem.message, problem.hint, row=number, path=path.name))
    return _from_objects(path, objects, findings)


def _from_objects(path: Path, objects: dict[int, Any], findings: list[Finding]) -> _Read:
    columns: dict[str, None] = {}
    rows: dict[int, Mapping[str, Any]] = {}
    for number, value in objects.items():
        if isinstance(value, dict):
            columns.update(dict.fromkeys(value))
            rows[number] = value
        else:
            what = f"`{path}` row {number} is {kind_of(value)}, expected an object"
            findings.append(finding("PARSE_ERROR", what, "write one object per sample", row=number, path=path.name))
    return tuple(columns), rows, findings


READERS = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl}
"""Ending of a metadata file -> what reads it."""


def _read_beside(base: Path, rules: Rules, listing: Listing) -> tuple[Table, list[Finding]]:
    """One row for each media file in a folder, with the caption in the text file of its name."""
    kind = rules.kind
    media = rules.target or TARGET_COLUMNS[-1]
    folder = sort_folder(listing, kind, (*METADATA_NAMES, *UNREAD_NAMES))
    table = Table(f"{base} (captions in text files)", base, (media, rules.text), {}, beside=True)
    findings = [*_links_out(listing), *check_folder(folder, kind)]
    if not folder.rows:
        what = f"`{base}` contains neither {', '.join(METADATA_NAMES)} nor {kind}s"
        hint = f"write a metadata.csv with the columns `{media}` and `{rules.text}`"
        empty = [] if any(one.level == "error" for one in findings) else [finding("EMPTY", what, hint)]
        return table, [*findings, *empty]
    rows: dict[int, Mapping[str, Any]] = {}
    for number, (name, captions) in enumerate(folder.rows.items(), start=1):
        text, fault = _read_beside_of(base, name, captions, number, listing)
        rows[number] = {media: name} if text is None else {media: name, rules.text: text}
        findings += [fault] if fault else []
    findings += _shared_captions(folder)
    return Table(table.origin, base, table.columns, rows, beside=True), findings


def _read_beside_of(
    base: Path, name: str, captions: tuple[str, ...], row: int, listing: Listing
) -> tuple[str | None, Finding | None]:
    """The caption of an image or clip, or why there is none."""
    if len(captions) > 1:
        rivals = rival_captions(name, captions)
        return None, finding("CAPTION_AMBIGUOUS", rivals.message, rivals.hint, row=row, path=name)
    if not captions:
        caption = expected_caption(name)
        if caption in listing.leaving:
            return None, _leads_out(caption, row)
        what = f"`{name}` has no caption: `{caption}` is missing"
        hint = "write the caption to a .txt file of the same name, or all captions to a metadata.csv"
        return None, finding("CAPTION_MISSING", what, hint, row=row, path=name)
    try:
        return read_caption(base / captions[0]), None
    except UnicodeDecodeError as error:
        (problem,) = not_utf8(Path(captions[0]), error).problems
        return None, finding("NOT_UTF8", problem.message, problem.hint, row=row, path=captions[0])
    except OSError as error:
        what = f"`{captions[0]}` cannot be read: {error.strerror}"
        return None, finding("PATH_MISSING", what, "check its permissions", row=row, path=captions[0])


def check_folder(folder: CaptionedFolder, kind: str) -> Iterator[Finding]:
    """What is to be said of the files of a folder that are no samples: what training says, file by file."""
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
    """PATH_OUTSIDE: an error for links that would be rows, a warning for those to folders and other files."""
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


def _shared_captions(folder: CaptionedFolder) -> Iterator[Finding]:
    numbers = {name: number for number, name in enumerate(folder.rows, start=1)}
    for names in folder.shared_captions():
        problem = shared_caption(*names)
        yield finding("STEM_COLLISION", problem.message, problem.hint, row=numbers[names[1]], path=names[1])

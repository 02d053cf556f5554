"""Metadata read as far as it can be: what cannot becomes findings, and the rest is checked all the same. No torch."""

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth_core.data.metadata import (
    CAPTION_ENDING,
    ENDINGS,
    METADATA_NAMES,
    UnreadableJson,
    csv_problem,
    decode_text,
    find_metadata,
    other_separator,
    parse_json,
)
from diffsynth_core.errors import DiffSynthError, kind_of
from diffsynth_core.validation.findings import Finding, found
from diffsynth_core.data.listing import Listing
from diffsynth_core.validation.rules import TARGET_COLUMNS, Rules


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


def locate_metadata(path: Path) -> tuple[Path, Path | None]:
    """The folder of a dataset and its metadata file (None: captions beside the files), from the PATH that was named.

    Raises:
        DiffSynthError: when there is nothing at PATH, or a file that is no metadata.
    """
    if path.is_dir():
        return path, find_metadata(path, None)
    if not path.is_file():
        raise DiffSynthError(f"there is neither a folder nor a file at `{path}`", "name the folder of the dataset")
    if path.suffix.lower() not in READERS:
        raise DiffSynthError(
            f"`{path}` is no metadata file: expected .csv, .json or .jsonl", "name the folder of the dataset"
        )
    return path.parent, path


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
        what = f"`{metadata}` line {line} is not UTF-8 (byte {error.start})"
        return empty, [found("NOT_UTF8", what, "save it as UTF-8", path=metadata.name)]
    columns, rows, findings = READERS[metadata.suffix.lower()](metadata, text)
    if not rows and not findings:
        findings = [found("EMPTY", f"`{metadata}` holds no row", "write one row per sample", path=metadata.name)]
    return Table(str(metadata), base, columns, rows), findings


_Read = tuple[tuple[str, ...], dict[int, Mapping[str, Any]], list[Finding]]
"""Columns, rows by number, and what could not be read."""


def _read_csv(path: Path, text: str) -> _Read:
    separated = other_separator(path, text)
    if separated:
        return (), {}, [found("PARSE_ERROR", separated.message, separated.hint, path=path.name)]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: dict[int, Mapping[str, Any]] = {}
    findings: list[Finding] = []
    header: tuple[str, ...] = ()
    number, line = 0, 1
    try:
        header = tuple(name.strip() for name in next(reader, []))
        for name in dict.fromkeys(name for name in header if header.count(name) > 1):
            what = f"`{path}` has the column `{name}` twice"
            findings.append(found("PARSE_ERROR", what, "rename one of them", path=path.name))
        width = len(header)
        line = reader.line_num + 1
        for cells in reader:
            line = reader.line_num + 1
            if not cells:
                continue
            number += 1
            if len(cells) > width:
                what = f"`{path}` line {reader.line_num}: {len(cells)} cells, the header has {width}"
                hint = "put texts with commas in quotes"
                findings.append(found("PARSE_ERROR", what, hint, row=number, path=path.name))
            else:
                rows[number] = dict(zip(header, cells, strict=False))
    except csv.Error as error:
        problem = csv_problem(path, error, line, reader.line_num)
        what = f"{problem.message}; nothing behind it was read"
        findings.append(found("PARSE_ERROR", what, problem.hint, path=path.name))
    return header, rows, findings


def _read_json(path: Path, text: str) -> _Read:
    try:
        content = parse_json(text)
    except UnreadableJson as error:
        what = f"`{path}` line {error.line}: {error}"
        return (), {}, [found("PARSE_ERROR", what, "mend that line", path=path.name)]
    if not isinstance(content, list):
        what = f"`{path}` holds {kind_of(content)}, expected a list of objects"
        return (), {}, [found("PARSE_ERROR", what, "write one object per sample", path=path.name)]
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
            objects[number] = parse_json(line)
        except UnreadableJson as error:
            what = f"`{path}` line {line_number}: {error}"
            findings.append(found("PARSE_ERROR", what, "mend that line", row=number, path=path.name))
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
            findings.append(found("PARSE_ERROR", what, "write one object per sample", row=number, path=path.name))
    return tuple(columns), rows, findings


READERS = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl}
"""Ending of a metadata file -> what reads it."""


def _read_beside(base: Path, rules: Rules, listing: Listing) -> tuple[Table, list[Finding]]:
    """One row for each media file in a folder, with the caption in the text file of its name."""
    kind = rules.kind
    media = rules.target or TARGET_COLUMNS[-1]
    names = sorted((name for name in listing.files if _ending(name) in ENDINGS[kind]), key=lambda name: name.split("/"))
    table = Table(f"{base} (captions beside the files)", base, (media, rules.text), {}, beside=True)
    if not names:
        what = f"`{base}` holds neither {', '.join(METADATA_NAMES)} nor {kind}s"
        hint = f"write a metadata.csv with the columns `{media}` and `{rules.text}`"
        return table, list(_links_out(listing, kind)) or [found("EMPTY", what, hint)]
    findings = [*_links_out(listing, kind), *_shared_captions(names)]
    rows: dict[int, Mapping[str, Any]] = {}
    for number, name in enumerate(names, start=1):
        caption = _stem(name) + CAPTION_ENDING
        if caption not in listing.files:
            if caption in listing.leaving:
                findings.append(_leads_out(caption, number))
            else:
                what = f"`{name}` has no caption beside it"
                findings.append(found("PATH_MISSING", what, f"write it into `{caption}`", row=number, path=caption))
            rows[number] = {media: name}
            continue
        try:
            rows[number] = {media: name, rules.text: (base / caption).read_text(encoding="utf-8-sig").strip()}
        except UnicodeDecodeError as error:
            what = f"`{caption}` is not UTF-8 (byte {error.start})"
            findings.append(found("NOT_UTF8", what, "save it as UTF-8", row=number, path=caption))
            rows[number] = {media: name}
        except OSError as error:
            what = f"`{caption}` cannot be read: {error.strerror}"
            findings.append(found("PATH_MISSING", what, "let it be read", row=number, path=caption))
            rows[number] = {media: name}
    return Table(table.origin, base, table.columns, rows, beside=True), findings


def _links_out(listing: Listing, kind: str) -> Iterator[Finding]:
    """PATH_OUTSIDE for links that would be rows."""
    yield from (_leads_out(name, None) for name in sorted(listing.leaving) if _ending(name) in ENDINGS[kind])


def _leads_out(name: str, row: int | None) -> Finding:
    what = f"`{name}` is a link that leads out of the dataset"
    return found("PATH_OUTSIDE", what, "copy the file itself", row=row, path=name)


def _shared_captions(names: list[str]) -> Iterator[Finding]:
    first: dict[str, str] = {}
    for number, name in enumerate(names, start=1):
        other = first.setdefault(_stem(name), name)
        if other != name:
            what = f"`{other}` and `{name}` share the caption `{_stem(name)}{CAPTION_ENDING}`"
            yield found("STEM_COLLISION", what, "move one of them away, or write a metadata.csv", row=number, path=name)


def _stem(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.rpartition('.')[0]}"


def _ending(name: str) -> str:
    return f".{name.rpartition('.')[2].lower()}"

"""Metadata of a dataset: csv, json, jsonl, or captions in text files next to the media. No torch.

One reader for training and for `dataset validate`: it reads as much as possible, and what it cannot read becomes
findings. Training rejects the errors among them, the report lists all.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffsynth_core.data.captioned_folder import CaptionedFolder, folder_notes, sort_folder
from diffsynth_core.data.file_index import Listing, list_files
from diffsynth_core.data.findings import Finding, finding
from diffsynth_core.data.folder_rows import read_folder_rows
from diffsynth_core.data.texts import SAVE_AS_UTF8, decode_text, likely_encoding
from diffsynth_core.errors import DiffSynthError, kind_of, list_names, truncate
from diffsynth_core.files import atomic_write
from diffsynth_core.json_files import InvalidJson, parse_json
from diffsynth_core.progress import pluralize

METADATA_NAMES = ("metadata.csv", "metadata.json", "metadata.jsonl")
"""Documented names of metadata files."""
UNREAD_NAMES = ("metadata.parquet", "metadata.tsv", "metadata.xlsx", "metadata.xls", "metadata.ods", "metadata.yaml")
"""Files that users take for metadata, but that are not read."""
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
"""Separators of spreadsheets other than commas -> name."""


@dataclass(frozen=True)
class Metadata:
    """The rows of a dataset by number, counting samples from 1.

    Attributes:
        origin: the file or folder that they were read from.
        base: folder that paths are relative to. Rows that cannot be parsed are omitted, with a finding for each.
        folder, listing: content of the folder, if captions are in text files next to the media; None with a metadata
            file.
    """

    origin: str
    base: Path
    columns: tuple[str, ...]
    rows: Mapping[int, Mapping[str, Any]]
    findings: tuple[Finding, ...] = ()
    folder: CaptionedFolder | None = None
    listing: Listing | None = None

    @property
    def captions_in_files(self) -> bool:
        """Whether captions are in text files next to the media."""
        return self.folder is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes of training about what is not read: other metadata files, unnamed columns, files of a folder."""
        unused = [one.message for one in self.findings if one.code == "METADATA_UNUSED"]
        unnamed = [f"{one.message} ({one.hint})" for one in self.findings if one.code == "COLUMN_UNKNOWN"]
        return (*unused, *unnamed, *(folder_notes(self.folder) if self.folder else ()))


def find_metadata(base: Path, given: Path | None) -> Path | None:
    """Return the metadata file: the given one, or the first of the documented names in `base`."""
    if given:
        return given
    return next((base / name for name in METADATA_NAMES if (base / name).is_file()), None)


def locate_metadata(base: Path, given: Path | None) -> Path | None:
    """Return the metadata file of the dataset in `base`; None if captions are next to the files.

    Raises:
        DiffSynthError: if the folder or the given file does not exist, or the file has an unsupported suffix.
    """
    if not base.is_dir():
        raise DiffSynthError(
            f"the dataset folder `{base}` (`dataset_base_path`) does not exist",
            "pass the folder with `--dataset_base_path`",
        )
    path = find_metadata(base, given)
    if path and not path.is_file():
        raise DiffSynthError(
            f"the metadata file `{path}` (`dataset_metadata_path`) does not exist", "fix `--dataset_metadata_path`"
        )
    if path and path.suffix.lower() not in READERS:
        raise DiffSynthError(
            f"`{path}` is not a metadata file: expected .csv, .json or .jsonl", "fix `--dataset_metadata_path`"
        )
    return path


def read_metadata(base: Path, given: Path | None, text_column: str, media_column: str, kind: str = "image") -> Metadata:
    """Return the metadata of the dataset in `base`, as far as it can be read.

    Without a metadata file the files below `base` are the rows, each with the caption in the text file of its name:
    images or, for the kind `video`, videos and images.

    Raises:
        DiffSynthError: if the folder or the given file does not exist, or the file has an unsupported suffix.
    """
    path = locate_metadata(base, given)
    unused = [] if given else _unused_metadata(base, path)
    if path is None:
        listing = list_files(base)
        folder = sort_folder(listing, kind, (*METADATA_NAMES, *UNREAD_NAMES))
        names = ", ".join(METADATA_NAMES)
        rows, findings = read_folder_rows(listing, folder, text_column, media_column, kind, names)
        columns, origin = (media_column, text_column), f"{base} (captions in text files)"
        return Metadata(origin, base, columns, rows, (*unused, *findings), folder, listing)
    table = _read_file(path)
    return Metadata(str(path), base, table.columns, table.rows, (*unused, *table.findings))


def _unused_metadata(base: Path, path: Path | None) -> list[Finding]:
    """Return METADATA_UNUSED for metadata files in `base` other than `path`, the one that was found."""
    names = (*METADATA_NAMES, *UNREAD_NAMES)
    others = [name for name in names if (path is None or name != path.name) and (base / name).is_file()]
    if not others:
        return []
    what = f"`{base}` contains {list_names(others)}, which is not read"
    if path:
        what, hint = f"{what} because `{path.name}` exists", "remove the file that you do not use"
    else:
        what, hint = f"{what}: expected {', '.join(METADATA_NAMES)}", "export it as metadata.csv"
    return [finding("METADATA_UNUSED", what, hint)]


@dataclass
class _Table:
    """Columns and rows as far as they could be read, and findings."""

    path: Path
    columns: tuple[str, ...] = ()
    rows: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def fault(self, what: str, hint: str | None, row: int | None = None, code: str = "PARSE_ERROR") -> "_Table":
        """Add a finding about the file."""
        self.findings.append(finding(code, what, hint, row=row, path=self.path.name))
        return self


def _read_file(path: Path) -> _Table:
    table = _Table(path)
    try:
        text = decode_text(path.read_bytes())
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        what = f"`{path}` line {line} is not UTF-8 (byte {error.start}){likely_encoding(error)}"
        return table.fault(what, SAVE_AS_UTF8, code="NOT_UTF8")
    READERS[path.suffix.lower()](table, text)
    if not table.rows and not table.findings:
        table.fault(f"`{path}` has no rows", "add one row per sample", code="EMPTY")
    return table


def _read_csv(table: _Table, text: str) -> None:
    path = table.path
    first_line = text.partition("\n")[0]
    separator = next((name for mark, name in SEPARATORS.items() if mark in first_line), None)
    if separator and "," not in first_line:
        table.fault(f"`{path}` separates its columns with {separator}, expected commas", "re-export it with commas")
        return
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows = table.rows
    unnamed: dict[int, str] = {}
    number, line = 0, 1
    try:
        header = tuple(name.strip() for name in next(reader, []))
        table.columns = tuple(filter(None, header))
        repeated = next((name for name in dict.fromkeys(table.columns) if table.columns.count(name) > 1), None)
        if repeated:
            table.fault(f"`{path}` has the column `{repeated}` twice", "rename one of them")
        line = reader.line_num + 1
        for cells in reader:
            line = reader.line_num + 1
            if not cells:
                continue
            number += 1
            split = _split_row(header, cells)
            if split is None:
                what = f"`{path}` line {reader.line_num}: {pluralize(len(cells), 'cell')}, but the header has {len(header)}"
                table.fault(what, "quote values that contain commas", number)
                continue
            rows[number], place = split
            if place:
                unnamed.setdefault(place, cells[place - 1])
    except csv.Error as error:
        what, hint = _csv_fault(error, line, reader.line_num)
        table.fault(f"`{path}` {what}; nothing after it was read", hint)
    for place, value in unnamed.items():
        what = f"`{path}` has values in column {place}, which has no name (`{truncate(value)}`): it is not read"
        hint = "name it in the first line, or remove it (pandas: `to_csv(…, index=False)`)"
        table.fault(what, hint, code="COLUMN_UNKNOWN")


def _csv_fault(error: csv.Error, first: int, last: int) -> tuple[str, str]:
    """Return why a CSV row, from line `first` to line `last`, cannot be read, and a hint: usually a quote."""
    if "expected after" in str(error):
        where = f"line {last}" if first == last else f"lines {first} to {last}"
        return f"{where}: {error}", "double the quotes inside a cell, and close the quotes around it"
    if "limit" in str(error):
        return f"line {first}: {error}", "shorten that cell, or close the quote opened there"
    return f"line {first}: unterminated cell ({error})", "close the quote opened there"


def _split_row(header: Sequence[str], cells: Sequence[str]) -> tuple[dict[str, str], int | None] | None:
    """Return a CSV row by column, and the index (from 1) of a value in an unnamed column, or None.

    Unnamed columns are allowed if they are empty, as spreadsheets write them. None if the row has more values than the
    header.
    """
    if len(cells) > len(header) and any(cell.strip() for cell in cells[len(header) :]):
        return None
    row = dict(zip(header, cells, strict=False))
    if "" not in row:
        return row, None
    unnamed = (
        place for place, (name, cell) in enumerate(zip(header, cells, strict=False), 1) if not name and cell.strip()
    )
    del row[""]
    return row, next(unnamed, None)


def _read_json(table: _Table, text: str) -> None:
    try:
        content = parse_json(text, finite=False)
    except InvalidJson as error:
        where = f" line {error.line}" if error.line else ""
        table.fault(f"`{table.path}`{where}: {error}", "fix that line" if error.line else "fix the file")
        return
    if isinstance(content, list):
        _take_objects(table, dict(enumerate(content, start=1)))
    else:
        what = f"`{table.path}` holds {kind_of(content)}, expected a list of objects"
        table.fault(what, "write one object per sample")


def _read_jsonl(table: _Table, text: str) -> None:
    objects: dict[int, Any] = {}
    number = 0
    for line_number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        number += 1
        try:
            objects[number] = parse_json(line, finite=False)
        except InvalidJson as error:
            table.fault(f"`{table.path}` line {line_number}: {error}", "fix that line", number)
    _take_objects(table, objects)


def _take_objects(table: _Table, objects: Mapping[int, Any]) -> None:
    """Add JSON objects as rows by number."""
    columns: dict[str, None] = {}
    for number, value in objects.items():
        if isinstance(value, dict):
            columns.update(dict.fromkeys(value))
            table.rows[number] = value
        else:
            what = f"`{table.path}` row {number} is {kind_of(value)}, expected an object"
            table.fault(what, "write one object per sample", number)
    table.columns = tuple(columns)


READERS = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl}
"""Suffix of a metadata file -> reader."""


def write_metadata(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a metadata.csv atomically."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(rows)

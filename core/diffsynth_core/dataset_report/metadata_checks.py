"""Codes of columns, cells and rows: EMPTY to ROW_DUPLICATE, and the reading of cells. No torch.

What cannot even be parsed is found by table.py.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from posixpath import normpath
from typing import Any

from diffsynth_core.data.file_index import Listing
from diffsynth_core.data.metadata import (
    LEAVE_OUT,
    lacks_header,
    missing_column,
    near_column,
    unread_column,
    unused_metadata,
)
from diffsynth_core.data.sampling import SAMPLING_CODE, read_sampling
from diffsynth_core.data.texts import MAX_CAPTION_CHARACTERS
from diffsynth_core.dataset_report.dataset_facts import DatasetFacts, Record
from diffsynth_core.dataset_report.findings import Finding, finding
from diffsynth_core.dataset_report.rules import Columns
from diffsynth_core.dataset_report.table import Table
from diffsynth_core.errors import DiffSynthError, truncate
from diffsynth_core.json_files import InvalidJson, parse_json


def check_unused(base: Path, metadata: Path | None) -> Iterator[Finding]:
    """METADATA_UNUSED."""
    unused = unused_metadata(base, metadata)
    if unused:
        yield finding("METADATA_UNUSED", unused.message, unused.hint)


def check_columns(table: Table, columns: Columns, hints: Mapping[str, str]) -> Iterator[Finding]:
    """COLUMN_MISSING and COLUMN_UNKNOWN; a column under a near name is told as missing only.

    `hints`: column -> what to do when it is there and not read."""
    if not table.columns:
        return
    missing = [name for name in columns.needed if name not in table.columns]
    unknown = [name for name in table.columns if name not in columns.known]
    for name in missing:
        near = near_column(name, unknown)
        if near:
            unknown.remove(near)
        problem = missing_column(table.origin, table.columns, name, columns.needed, near, table.beside)
        yield finding("COLUMN_MISSING", problem.message, problem.hint)
    for name in unknown if not lacks_header(table.columns) else ():
        problem = unread_column(table.origin, name, columns.known, hints.get(name, LEAVE_OUT))
        yield finding("COLUMN_UNKNOWN", problem.message, problem.hint)


def read_records(table: Table, columns: Columns) -> tuple[tuple[Record, ...], list[Finding]]:
    """The rows with their cells read; CELL_EMPTY, CELL_TYPE and PAIR_MISSING where a cell holds nothing of use."""
    findings: list[Finding] = []
    media = [name for name in columns.media if name in table.columns]
    has_text = columns.text in table.columns
    records = []
    for row, cells in table.rows.items():
        files = {}
        for column in media:
            names = _names(cells.get(column), row, column, columns, findings)
            if names:
                files[column] = names
        unread = table.beside and columns.text not in cells  # the text file has been found missing or unreadable
        caption = _caption(cells.get(columns.text), row, columns.text, findings) if has_text and not unread else None
        records.append(Record(row, caption, files))
    return tuple(records), findings


def _names(value: Any, row: int, column: str, columns: Columns, findings: list[Finding]) -> tuple[str, ...]:
    """The files that a cell names."""
    if isinstance(value, str):
        text = value.strip()
        if text and text[0] != "[":
            return (normalised(value),)
        with suppress(InvalidJson):  # a file name may begin with a bracket
            value = parse_json(text, finite=False) if text else ""
    names = value if isinstance(value, list) else [value]
    if not names or any(is_empty(name) or (isinstance(name, str) and not name.strip()) for name in names):
        code = "PAIR_MISSING" if column in columns.references else "CELL_EMPTY"
        what = f"row {row}: column `{column}` is empty"
        findings.append(finding(code, what, "add the file, or remove the row", row=row))
        return ()
    if not all(isinstance(name, str) for name in names):
        what = f"row {row}: column `{column}` holds `{truncate(json.dumps(value))}`, expected a path"
        findings.append(finding("CELL_TYPE", what, "write the path as a string", row=row))
        return ()
    return tuple(map(normalised, names))


def as_on_disk(records: tuple[Record, ...], listing: Listing) -> tuple[Record, ...]:
    """The rows with the names of files as the disk spells them: without blanks at the ends, and accents as there."""
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


def _caption(value: Any, row: int, column: str, findings: list[Finding]) -> str | None:
    """The caption as it stands; None where the cell holds something else."""
    if isinstance(value, str) and len(value) <= MAX_CAPTION_CHARACTERS:
        return value
    if isinstance(value, str):
        what = f"row {row}: column `{column}` has {len(value)} characters, expected at most {MAX_CAPTION_CHARACTERS}"
        findings.append(finding("CELL_TYPE", what, "shorten the caption", row=row))
        return None
    if value is None:
        return ""
    if isinstance(value, float) and value != value:  # the NaN that tables are exported with
        return str(value)
    what = f"row {row}: column `{column}` holds `{truncate(json.dumps(value))}`, expected a string"
    findings.append(finding("CELL_TYPE", what, "write the caption as a string", row=row))
    return None


def is_empty(value: Any) -> bool:
    """Whether a cell of JSON holds nothing: null, or the NaN that tables are exported with."""
    return value is None or (isinstance(value, float) and value != value)


def normalised(name: str) -> str:
    """A path without `.` and doubled slashes; what leads out of the folder still does. An address stays as it is."""
    if "://" in name:
        return name
    return normpath(name) if "." in name[:2] or "//" in name or "/." in name else name


def check_sampling(dataset: DatasetFacts) -> Iterator[Finding]:
    """CELL_TYPE of the columns that say how a sampler makes the image, where those are read."""
    if not dataset.columns.required:
        return
    for row, cells in dataset.table.rows.items():
        try:
            read_sampling(cells, f"row {row}")
        except DiffSynthError as error:
            for problem in error.problems:
                yield finding(SAMPLING_CODE, problem.message, problem.hint, row=row)


def check_rows(table: Table) -> Iterator[Finding]:
    """ROW_DUPLICATE."""
    keys = {row: _key(cells) for row, cells in table.rows.items()}
    if len(set(keys.values())) == len(keys):
        return
    first: dict[Any, int] = {}
    for row, key in keys.items():
        other = first.setdefault(key, row)
        if other != row:
            yield finding("ROW_DUPLICATE", f"row {row} is a duplicate of row {other}", "remove one of them", row=row)


def _key(cells: Mapping[str, Any]) -> Any:
    try:
        key = tuple(cells.values())
        hash(key)
    except TypeError:
        return json.dumps(cells, sort_keys=True)
    return key

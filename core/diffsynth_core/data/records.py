"""Parsed cells of a dataset: captions, file names, sampler parameters. No torch.

What a cell must not contain is checked here, once: training rejects the row, `dataset validate` reports it.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from posixpath import normpath
from typing import Any, NamedTuple

from diffsynth_core.data.conditions import Columns, ValueCondition
from diffsynth_core.data.findings import Finding, finding
from diffsynth_core.data.metadata import Metadata
from diffsynth_core.data.sampling import SAMPLING_CODE, Sampling, number_of, read_sampling
from diffsynth_core.data.texts import MAX_CAPTION_CHARACTERS
from diffsynth_core.errors import DiffSynthError, truncate
from diffsynth_core.json_files import InvalidJson, parse_json

MISSING_VALUES = frozenset({"nan", "null", "none", "<na>", "#n/a"})
"""Values that programs write for missing cells, in lower case."""
LONGEST_MISSING = max(map(len, MISSING_VALUES))
"""Length of the longest of them."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""An unpaired surrogate, which no text encoder accepts."""


class Record(NamedTuple):
    """A row with parsed cells.

    Attributes:
        caption: None if there is no text.
        files: column -> paths, relative to the folder of the dataset and normalized; empty and invalid cells are
            omitted.
    """

    row: int
    caption: str | None
    files: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Cells:
    """All parsed rows, and by row their sampler parameters and their numbers and texts, if those are read."""

    records: tuple[Record, ...]
    sampling: Mapping[int, Sampling]
    findings: tuple[Finding, ...]
    values: Mapping[int, Mapping[str, float | str]] = field(default_factory=dict)


def read_cells(metadata: Metadata, columns: Columns) -> Cells:
    """Parse the cells of all rows.

    Findings: CELL_EMPTY, CELL_TYPE, PAIR_MISSING and PAIR_COUNT of cells with file names; CELL_TYPE, CAPTION_NAN and,
    for an unpaired surrogate, CAPTION_CONTROL_CHARS of captions; CELL_TYPE of sampler parameters.
    """
    findings: list[Finding] = []
    records: list[Record] = []
    sampling: dict[int, Sampling] = {}
    values: dict[int, Mapping[str, float | str]] = {}
    media = [name for name in columns.media if name in metadata.columns]
    has_text = columns.text in metadata.columns
    sampled = columns.sampling and set(columns.sampling) <= set(metadata.columns)
    for row, cells in metadata.rows.items():
        files = {}
        for column in media:
            names = _read_names(cells.get(column), row, column, columns, findings)
            if names:
                files[column] = names
        unread = (
            metadata.captions_in_files and columns.text not in cells
        )  # the text file has been found missing or unreadable
        caption = (
            _read_caption(cells.get(columns.text), row, columns.text, findings) if has_text and not unread else None
        )
        records.append(Record(row, caption, files))
        if columns.values:
            read = {one.column: _read_value(cells.get(one.column), row, one, findings) for one in columns.values}
            values[row] = {column: value for column, value in read.items() if value is not None}
        if sampled:
            try:
                sampling[row] = read_sampling(cells, f"row {row}")
            except DiffSynthError as error:
                findings += [finding(SAMPLING_CODE, one.message, one.hint, row=row) for one in error.problems]
    return Cells(tuple(records), sampling, tuple(findings), values)


def _read_names(value: Any, row: int, column: str, columns: Columns, findings: list[Finding]) -> tuple[str, ...]:
    """Return the files in a cell."""
    if isinstance(value, str):
        text = value.strip()
        if text and text[0] != "[":
            return (normalized(value),)
        with suppress(InvalidJson):  # a file name may begin with a bracket
            value = parse_json(text, finite=False) if text else ""
    names = value if isinstance(value, list) else [value]
    if not names or any(_is_empty(name) for name in names):
        if len(names) > 1 or column in columns.required_media:
            code = "PAIR_MISSING" if column in columns.references else "CELL_EMPTY"
            what = f"row {row}: column `{column}` is empty"
            findings.append(finding(code, what, "add the file, or remove the row", row=row))
        return ()
    if not all(isinstance(name, str) for name in names):
        what = f"row {row}: column `{column}` holds `{truncate(json.dumps(value))}`, expected a path"
        findings.append(finding("CELL_TYPE", what, "write the path as a string", row=row))
        return ()
    _check_count(names, row, column, columns, findings)
    return tuple(map(normalized, names))


def _check_count(names: Sequence[str], row: int, column: str, columns: Columns, findings: list[Finding]) -> None:
    limit = columns.max_counts[column] if len(names) > 1 else None
    if limit is not None and len(names) > limit:
        what = f"row {row}: column `{column}` lists {len(names)} files, expected {limit}"
        findings.append(finding("PAIR_COUNT", what, "write one row per file", row=row))


def _read_caption(value: Any, row: int, column: str, findings: list[Finding]) -> str | None:
    """Return the caption unchanged; None if the cell is not text, empty if the cell is."""
    if value is None:
        return ""
    if isinstance(value, float) and value != value:  # the NaN that tables are exported with
        value = str(value)
    if not isinstance(value, str):
        what = f"row {row}: column `{column}` holds `{truncate(json.dumps(value))}`, expected a string"
        findings.append(finding("CELL_TYPE", what, "write the caption as a string", row=row))
        return None
    if len(value) > MAX_CAPTION_CHARACTERS:
        what = f"row {row}: column `{column}` has {len(value)} characters, expected at most {MAX_CAPTION_CHARACTERS}"
        findings.append(finding("CELL_TYPE", what, "shorten the caption", row=row))
        return None
    stripped = value.strip()
    if len(stripped) <= LONGEST_MISSING and stripped.lower() in MISSING_VALUES:
        what = f"row {row}: the caption is `{stripped}`, a placeholder for a missing value"
        findings.append(finding("CAPTION_NAN", what, "write the caption", row=row))
    half = None if value.isascii() else SURROGATE.search(value)
    if half:
        what = f"row {row}: the caption contains an unpaired surrogate (U+{ord(half[0]):04X})"
        findings.append(finding("CAPTION_CONTROL_CHARS", what, "fix the caption", row=row, level="error"))
    return value


def _read_value(value: Any, row: int, condition: ValueCondition, findings: list[Finding]) -> float | str | None:
    """Return the number or text in a cell; None if it is empty or neither."""
    where = f"row {row}: column `{condition.column}`"
    if _is_empty(value):
        if condition.required:
            findings.append(finding("CELL_EMPTY", f"{where} is empty", "fill it in, or remove the row", row=row))
        return None
    found: float | str | None
    if condition.kind == "text":
        found = value if isinstance(value, str) else None
    else:
        number = number_of(value)
        found = None if math.isnan(number) else number
    if found is None:
        expected = "a number" if condition.kind == "number" else "a string"
        what = f"{where} holds `{truncate(json.dumps(value))}`, expected {expected}"
        findings.append(finding("CELL_TYPE", what, "correct it, or remove the row", row=row))
    return found


def _is_empty(value: Any) -> bool:
    """Return whether a cell is empty: blank, null, or the NaN of exported tables."""
    return (
        value is None or (isinstance(value, float) and value != value) or (isinstance(value, str) and not value.strip())
    )


def normalized(name: str) -> str:
    """Return a path without `.` and double slashes; leading `..` are kept. URLs are unchanged."""
    if "://" in name:
        return name
    return normpath(name) if "." in name[:2] or "//" in name or "/." in name else name

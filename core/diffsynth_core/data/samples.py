"""Samples: rows of the metadata checked, with their files found and their training size known. No torch."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth_core.data.metadata import Metadata
from diffsynth_core.data.pictures import PictureHeader, SizeRule, read_picture_header
from diffsynth_core.errors import DiffSynthError, Problem, shorten, suggest
from diffsynth_core.progress import Reporter

HEADER_THREADS = 8
"""Headers are small reads; on a network disk waiting for them one by one is what takes the time."""


@dataclass(frozen=True)
class Sample:
    """One row: its number, its caption, its files by column, and the size it is trained at in pixels."""

    row: int
    caption: str
    media: Mapping[str, Path]
    height: int
    width: int

    @property
    def name(self) -> str:
        """How messages name the sample."""
        return f"row {self.row} `{next(iter(self.media.values()))}`"


@dataclass(frozen=True)
class SampleSet:
    """All samples of a dataset, and what is worth saying of them once."""

    samples: tuple[Sample, ...]
    notes: tuple[str, ...]


def check_columns(
    metadata: Metadata, text_column: str, media_columns: Sequence[str], data_file_keys: Sequence[str]
) -> list[Problem]:
    """Columns that the family needs and the metadata, or `data_file_keys`, lacks."""
    problems = []
    for column in (*media_columns, text_column):
        if column not in metadata.columns:
            near = suggest(column, metadata.columns)
            hint = f"rename `{near}`" if near else "add the column"
            problems.append(
                Problem(f"`{metadata.origin}` has no column `{column}`; it has {shorten(metadata.columns)}", hint)
            )
    for column in media_columns:
        if column not in data_file_keys:
            problems.append(
                Problem(
                    f"`data_file_keys` leaves out `{column}`, whose files this family trains on",
                    f"add `{column}`",
                    wrong_use=True,
                )
            )
    return problems


def build_samples(
    metadata: Metadata, base: Path, text_column: str, media_columns: Sequence[str], rule: SizeRule, reporter: Reporter
) -> tuple[SampleSet, list[Problem]]:
    """The samples of a dataset, and the rows that cannot be trained on."""
    problems: list[Problem] = []
    found: list[tuple[int, str, dict[str, Path]]] = []
    for number, row in enumerate(metadata.rows, start=1):
        where = f"`{metadata.origin}` row {number}"
        try:
            caption = _caption(row.get(text_column), text_column, where)
            media = {column: _media_path(row.get(column), column, base, where) for column in media_columns}
        except DiffSynthError as error:
            problems += error.problems
            continue
        found.append((number, caption, media))
    return _measure(found, metadata, media_columns[0], rule, problems, reporter)


def _measure(
    found: list[tuple[int, str, dict[str, Path]]],
    metadata: Metadata,
    media_column: str,
    rule: SizeRule,
    problems: list[Problem],
    reporter: Reporter,
) -> tuple[SampleSet, list[Problem]]:
    """Read the headers of all pictures and settle the training sizes."""
    samples = []
    rotated = transparent = 0
    with (
        reporter.task("Reading picture headers", len(found), "pictures") as task,
        ThreadPoolExecutor(HEADER_THREADS) as pool,
    ):
        headers = pool.map(lambda entry: _header_or_problem(entry[2][media_column]), found)
        for (number, caption, media), header in zip(found, headers, strict=True):
            task.advance()
            where = f"`{metadata.origin}` row {number}"
            if isinstance(header, Problem):
                problems.append(Problem(f"{where}: {header.message}", header.hint))
                continue
            height, width = rule.target(header.width, header.height)
            if min(height, width) < rule.factor or min(header.height, header.width) < rule.factor:
                problems.append(_too_small(where, media[media_column], header, rule))
                continue
            rotated += header.rotated
            transparent += header.transparent
            samples.append(Sample(number, caption, media, height, width))
    notes = []
    if rotated:
        notes.append(f"{rotated} of {len(samples)} pictures are turned upright as their EXIF orientation says")
    if transparent:
        notes.append(f"{transparent} of {len(samples)} pictures have transparency, which is composed on white")
    return SampleSet(tuple(samples), tuple(notes)), problems


def _header_or_problem(path: Path) -> PictureHeader | Problem:
    try:
        return read_picture_header(path)
    except DiffSynthError as error:
        return error.problems[0]


def _too_small(where: str, path: Path, header: PictureHeader, rule: SizeRule) -> Problem:
    if min(header.width, header.height) < rule.factor:
        return Problem(
            f"{where}: `{path}` is {header.width} x {header.height} pixels; a side is below the least of {rule.factor}",
            "replace the picture or take its row out",
        )
    return Problem(
        f"{where}: `{path}` is {header.width} x {header.height} pixels; with `max_pixels` {rule.max_pixels} a side falls below the least of {rule.factor}",
        "replace the picture, take its row out, or raise `max_pixels`",
    )


def _caption(value: Any, column: str, where: str) -> str:
    """The caption as it stands; an empty cell is an empty caption."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if not isinstance(value, str):
        raise DiffSynthError(
            f"{where}: column `{column}` holds `{json.dumps(value)}`, expected a text", "write the caption as a text"
        )
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DiffSynthError(f"{where}: column `{column}` holds half a character", "mend the caption")
    return value


def _media_path(value: Any, column: str, base: Path, where: str) -> Path:
    """The one file a cell names, below `base`."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(json.JSONDecodeError):  # a file name may begin with a bracket
            value = json.loads(value)
    if isinstance(value, list):
        if len(value) != 1:
            raise DiffSynthError(
                f"{where}: column `{column}` lists {len(value)} files, expected one", "write one row per picture"
            )
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise DiffSynthError(f"{where}: column `{column}` is empty", "name the file, or take the row out")
    path = base / value.strip()
    if not path.is_file():
        raise DiffSynthError(
            f"{where}: column `{column}` names `{path}`, which is not there",
            "correct the path (relative to `dataset_base_path`), or take the row out",
        )
    return path

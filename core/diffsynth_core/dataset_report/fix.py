"""`--fix`: a metadata file with the rows of a dataset that have no errors. No torch."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth_core.data.metadata import write_metadata
from diffsynth_core.dataset_report.dataset_facts import DatasetFacts
from diffsynth_core.dataset_report.report import Report
from diffsynth_core.errors import DiffSynthError, FaultsFound, Problem


@dataclass(frozen=True)
class Fixed:
    """A metadata file that was written. `base`: folder that its paths are relative to."""

    path: Path
    base: Path
    kept: int
    left_out: int

    @property
    def beside_files(self) -> bool:
        """Whether it is in the folder that its paths are relative to."""
        return self.path.parent.resolve() == self.base.resolve()


def check_target(path: Path) -> None:
    """Check in advance that a metadata file can be written to a path.

    Raises:
        FaultsFound: if it is not a .csv, or already exists.
    """
    problems = []
    if path.suffix.lower() != ".csv":
        problems.append(Problem(f"`--fix` writes a .csv file, got `{path}`", "pass a .csv path", wrong_use=True))
    elif path.exists() or path.is_symlink():
        what = f"`{path}` (`--fix`) already exists and is never overwritten"
        problems.append(Problem(what, "choose a new file name", wrong_use=True))
    if problems:
        raise FaultsFound(problems)


def write_fixed(path: Path, dataset: DatasetFacts, report: Report) -> Fixed:
    """Write the rows without errors, with all of their columns.

    Raises:
        DiffSynthError: if no selection of rows fixes the dataset, or no row is left.
    """
    errors = [finding for finding in report.findings if finding.level == "error"]
    of_all = [finding for finding in errors if finding.row is None]
    if of_all:
        raise DiffSynthError(
            f"`{path}` was not written, because removing rows does not fix this: {of_all[0].message}",
            of_all[0].hint,
        )
    faulty = {finding.row for finding in errors}
    metadata = dataset.rows.metadata
    rows = [cells for number, cells in metadata.rows.items() if number not in faulty]
    if not rows:
        raise DiffSynthError(f"every row has errors; `{path}` was not written", "fix the rows")
    columns = list(dict.fromkeys([*metadata.columns, *(name for cells in rows for name in cells)]))
    check_target(path)
    try:
        write_metadata(path, columns, _as_texts(columns, rows))
    except UnicodeEncodeError as error:
        raise DiffSynthError(
            f"`{path}` was not written: a cell contains an unpaired surrogate", "fix the metadata"
        ) from error
    return Fixed(path, metadata.base, len(rows), len(faulty))


def _as_texts(columns: list[str], rows: list[Any]) -> Iterator[list[str]]:
    for cells in rows:
        yield [_as_text(cells.get(column)) for column in columns]


def _as_text(value: Any) -> str:
    """Convert a JSON cell to CSV: strings unchanged, null to empty, everything else to JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

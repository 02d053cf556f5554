"""What the checks look at: the rows of a dataset and all that is known of its files. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from diffsynth_core.data.file_index import Listing
from diffsynth_core.dataset_report.facts import ImageFacts, VideoFacts
from diffsynth_core.dataset_report.rules import Columns, Rules
from diffsynth_core.dataset_report.table import Table


class Record(NamedTuple):
    """A row whose cells have been read.

    `caption`: None where there is no text. `files`: paths by column, relative to the folder of the dataset and
    normalised; a column whose cell is empty or wrong is left out.
    """

    row: int
    caption: str | None
    files: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class DatasetFacts:
    """A dataset as far as it has been looked into.

    `listing`: None where paths are not checked. `present`: the paths, of those that rows name, whose files are there
    and lie in the dataset; only these are opened. `images` and `videos`: facts by path, empty where files are not
    looked into; a file that could not be decoded has facts with a `fault`.
    """

    table: Table
    columns: Columns
    records: tuple[Record, ...]
    rules: Rules
    listing: Listing | None = None
    present: frozenset[str] = frozenset()
    images: Mapping[str, ImageFacts] = field(default_factory=dict)
    videos: Mapping[str, VideoFacts] = field(default_factory=dict)

    def first_rows(self) -> dict[str, int]:
        """The first row that names each path; what is found of a file is told there, once."""
        rows: dict[str, int] = {}
        for record in self.records:
            for names in record.files.values():
                for name in names:
                    rows.setdefault(name, record.row)
        return rows

    def of_columns(self, columns: tuple[str, ...]) -> frozenset[str]:
        """The paths that rows name in these columns."""
        return frozenset(name for record in self.records for column in columns for name in record.files.get(column, ()))

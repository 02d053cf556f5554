"""Input of the checks: the rows of a dataset and facts about its files. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from diffsynth_core.data.rows import Rows
from diffsynth_core.dataset_report.facts import ImageFacts, VideoFacts
from diffsynth_core.dataset_report.rules import Rules


@dataclass(frozen=True)
class DatasetFacts:
    """A dataset as far as it has been read.

    Attributes:
        images, videos: facts by path; empty if files are not opened. A file that could not be decoded has a `fault`.
    """

    rows: Rows
    rules: Rules
    images: Mapping[str, ImageFacts] = field(default_factory=dict)
    videos: Mapping[str, VideoFacts] = field(default_factory=dict)

    def first_rows(self) -> dict[str, int]:
        """Path -> first row that names it, at which its findings are reported, once."""
        rows: dict[str, int] = {}
        for record in self.rows.records:
            for names in record.files.values():
                for name in names:
                    rows.setdefault(name, record.row)
        return rows

    def of_columns(self, columns: tuple[str, ...]) -> frozenset[str]:
        """Return the paths in these columns."""
        return frozenset(
            name for record in self.rows.records for column in columns for name in record.files.get(column, ())
        )

"""What the checks look at: the rows of a dataset and all that is known of its files. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from diffsynth_core.data.rows import Rows
from diffsynth_core.dataset_report.facts import ImageFacts, VideoFacts
from diffsynth_core.dataset_report.rules import Rules


@dataclass(frozen=True)
class DatasetFacts:
    """A dataset as far as it has been looked into.

    `images` and `videos`: facts by path, empty where files are not looked into; a file that could not be decoded has
    facts with a `fault`.
    """

    rows: Rows
    rules: Rules
    images: Mapping[str, ImageFacts] = field(default_factory=dict)
    videos: Mapping[str, VideoFacts] = field(default_factory=dict)

    def first_rows(self) -> dict[str, int]:
        """The first row that names each path; what is found of a file is told there, once."""
        rows: dict[str, int] = {}
        for record in self.rows.records:
            for names in record.files.values():
                for name in names:
                    rows.setdefault(name, record.row)
        return rows

    def of_columns(self, columns: tuple[str, ...]) -> frozenset[str]:
        """The paths that rows name in these columns."""
        return frozenset(
            name for record in self.rows.records for column in columns for name in record.files.get(column, ())
        )

"""Results of the checks, as values. No torch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffsynth_core.data.findings import CODES, LEVELS, Finding, Level


def in_order(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Sort findings: worst first, then grouped by code in the order of the table, then by row and path."""
    places = {code: place for place, code in enumerate(CODES)}
    return tuple(
        sorted(
            findings,
            key=lambda finding: (
                LEVELS.index(finding.level),
                places[finding.code],
                finding.row or 0,
                finding.path or "",
            ),
        )
    )


@dataclass(frozen=True)
class Summary:
    """Numbers of a report.

    Attributes:
        origin: the file or folder that the rows were read from.
        codes: number of findings by code.
        decoded: whether files were examined.
    """

    origin: str
    recipe: str | None
    rows: int
    images: int
    videos: int
    errors: int
    warnings: int
    infos: int
    codes: Mapping[str, int]
    decoded: bool


@dataclass(frozen=True)
class Report:
    """Results of the checks; `findings` are in the order of `in_order`.

    Attributes:
        fingerprint: sha256 of rows and files, independent of the dataset's location.
    """

    summary: Summary
    fingerprint: str
    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """0 without errors, 1 with errors."""
        return 1 if self.summary.errors else 0

    def as_plain(self) -> dict[str, Any]:
        """Return the report for `--format json`; `pictures` is the name that `images` had first, kept for scripts."""
        return {
            "summary": asdict(self.summary) | {"pictures": self.summary.images},
            "fingerprint": self.fingerprint,
            "findings": [asdict(finding) for finding in self.findings],
        }


def count_levels(findings: Sequence[Finding]) -> dict[Level, int]:
    """Return the number of findings of each level."""
    counted = Counter(finding.level for finding in findings)
    return {level: counted[level] for level in LEVELS}

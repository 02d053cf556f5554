"""The report of a dataset as text for people."""

from collections.abc import Iterator
from itertools import groupby

from diffsynth_core.progress import count_of
from diffsynth_core.validation.findings import CODES, Report

SHOWN_OF_A_CODE = 5


def report_lines(report: Report) -> Iterator[str]:
    """The worst first, grouped by code, a few of each; then the sum."""
    for code, group in groupby(report.findings, key=lambda finding: finding.code):
        findings = list(group)
        yield f"{CODES[code].level} {code}: {CODES[code].explanation} ({len(findings)})"
        yield from (f"  {finding.message}" for finding in findings[:SHOWN_OF_A_CODE])
        if len(findings) > SHOWN_OF_A_CODE:
            yield f"  and {len(findings) - SHOWN_OF_A_CODE} more"
        hints = dict.fromkeys(finding.hint for finding in findings[:SHOWN_OF_A_CODE] if finding.hint)
        yield from (f"  hint: {hint}" for hint in list(hints)[:1])
    summary = report.summary
    rows, errors, warnings = (
        count_of(number, noun)
        for number, noun in ((summary.rows, "row"), (summary.errors, "error"), (summary.warnings, "warning"))
    )
    yield f"`{summary.origin}`: {rows}, {errors}, {warnings}"

"""The report of a dataset as text for people: the worst first, grouped by code, a few findings of each."""

from collections.abc import Iterator
from itertools import groupby

from rich.console import Console
from rich.text import Text

from diffsynth_cli.printing import printable
from diffsynth_core.data.findings import CODES, Finding, Level
from diffsynth_core.dataset_report.report import Report, Summary
from diffsynth_core.progress import pluralize

SHOWN_OF_A_CODE = 5
"""Maximum number of findings shown for a code."""
STYLES: dict[Level, str] = {"error": "bold red", "warning": "yellow", "info": "cyan"}
"""Level -> style."""
ROW_WIDTH = 7
"""Width of the column of row numbers."""


def report_texts(report: Report, width: int) -> Iterator[Text]:
    """A block of at most `width` columns for each level and code, then the sum and the reason of the exit code."""
    for (level, code), group in groupby(report.findings, key=lambda finding: (finding.level, finding.code)):
        findings = list(group)
        yield Text("\n").join([_heading(level, code, len(findings)), *_rows(findings, width), Text()])
    yield from (Text(line) for line in _sum(report.summary))


def _heading(level: Level, code: str, count: int) -> Text:
    heading = Text.assemble((level, STYLES[level]), " ", (code, "bold"), f" ({count})\n")
    return heading.append(f"  {CODES[code].explanation}", "dim")


def _rows(findings: list[Finding], width: int) -> Iterator[Text]:
    """The first findings of one code, by row, with their hints, or below them the hint that all share."""
    shown = findings[:SHOWN_OF_A_CODE]
    hints = {finding.hint for finding in shown}
    for finding in shown:
        yield _set_in("" if finding.row is None else str(finding.row), Text(printable(_without_row(finding))), width)
        if len(hints) > 1 and finding.hint:
            yield _set_in("", _hint(finding.hint), width)
    if len(findings) > len(shown):
        yield _set_in("", Text(f"and {len(findings) - len(shown)} more"), width)
    (same,) = hints if len(hints) == 1 else (None,)
    if same:
        yield _set_in("", _hint(same), width)


def _set_in(row: str, text: Text, width: int) -> Text:
    """Return a text after the number of its row; continuation lines are aligned with its start."""
    lines = text.wrap(Console(), max(1, width - ROW_WIDTH - 1), overflow="fold")
    return Text(f"{row:>{ROW_WIDTH}} ") + Text("\n" + " " * (ROW_WIDTH + 1)).join(lines)


def _hint(text: str) -> Text:
    return Text.assemble(("hint: ", "cyan"), printable(text))


def _without_row(finding: Finding) -> str:
    """Return the message without its row, which is displayed next to it."""
    return finding.message.removeprefix(f"row {finding.row}: ")


def _sum(summary: Summary) -> Iterator[str]:
    """What was looked at, what was found, and why the exit code is what it is."""
    looked_at = [pluralize(summary.rows, "row")]
    if summary.decoded:
        looked_at += [
            f"{pluralize(number, noun)} decoded"
            for number, noun in ((summary.images, "image"), (summary.videos, "video"))
            if number
        ]
    rules = f"the rules of `{summary.recipe}`" if summary.recipe else "rules common to all families (no --recipe given)"
    yield f"{printable(summary.origin)}: {', '.join(looked_at)}; {rules}"
    counts = ((summary.errors, "error"), (summary.warnings, "warning"), (summary.infos, "info"))
    yield ", ".join(pluralize(number, noun) for number, noun in counts)
    if summary.errors:
        yield "exit code 1: the errors would stop or degrade training"
    else:
        yield "exit code 0: no errors"

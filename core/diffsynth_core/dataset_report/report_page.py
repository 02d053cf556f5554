"""The report of a dataset as one self-contained HTML page: no other files, no network. No torch.

Facts about the whole dataset are HTML, readable without scripts; findings and samples are JSON, which the page's
script renders a few dozen at a time. Template, style and script are in the folder `page`, after the style of all pages.
"""

import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from string import Template

from diffsynth_core.data.findings import CODES, LEVELS, SUBJECTS
from diffsynth_core.dataset_report.dataset_facts import DatasetFacts
from diffsynth_core.dataset_report.report import Report, Summary
from diffsynth_core.dataset_report.report_data import PageData, page_data
from diffsynth_core.dataset_report.report_figures import buckets_html, histogram_html, histograms
from diffsynth_core.errors import FaultsFound, Problem
from diffsynth_core.html_page.document import (
    base_style,
    content_policy,
    generator_mark,
    has_mark,
    read_part,
    write_page_text,
)
from diffsynth_core.progress import format_bytes, pluralize

THUMBNAIL_SIDE = 160
"""Longer side, in pixels, of the thumbnails for which the page is designed; for `CheckOptions.thumbnails`."""
ENDINGS = (".html", ".htm")
"""Suffixes of pages."""
MARK = generator_mark("dataset validate")
"""Marker in the head of every page."""


def check_page_path(path: Path) -> None:
    """Check in advance that a page can be written to a path; only our own pages are overwritten.

    Raises:
        FaultsFound: if the suffix is wrong, or another file exists.
    """
    if path.suffix.lower() not in ENDINGS:
        raise FaultsFound(
            [Problem(f"`--report` writes an .html file, got `{path}`", "pass an .html path", wrong_use=True)]
        )
    if (path.exists() or path.is_symlink()) and not has_mark(path, MARK):
        what = f"`{path}` (`--report`) exists and is not a report, so it is not overwritten"
        raise FaultsFound([Problem(what, "choose a new file name", wrong_use=True)])


def write_page(path: Path, report: Report, dataset: DatasetFacts) -> None:
    """Write the page atomically.

    Raises:
        DiffSynthError: if the disk refuses.
    """
    write_page_text(path, page_html(report, dataset))


def page_html(report: Report, dataset: DatasetFacts) -> str:
    """Return the page as a string."""
    style, script = base_style() + _part("report.css"), _part("report.js")
    data = page_data(report, dataset)
    summary = report.summary
    return Template(_part("report.html")).substitute(
        mark=MARK,
        policy=content_policy(style, script),
        style=style,
        script=script,
        data=data.json,
        title=escape(dataset.rows.metadata.base.resolve().name or summary.origin),
        origin=escape(summary.origin),
        recipe=f"checked for <b>{escape(summary.recipe)}</b>" if summary.recipe else "checked with the general rules",
        fingerprint=report.fingerprint,
        verdict=_verdict(summary),
        verdict_level="error" if summary.errors else "good",
        numbers=_numbers(summary),
        figures="".join(map(histogram_html, histograms(dataset))),
        buckets=buckets_html(dataset) or "<p>No training sizes are known.</p>",
        levels="".join(_level_buttons(summary)),
        codes="".join(_code_buttons(summary)),
        held=_held(data, summary),
    )


def _part(name: str) -> str:
    return read_part("diffsynth_core.dataset_report", name)


def _verdict(summary: Summary) -> str:
    if summary.errors:
        return f"{pluralize(summary.errors, 'error')} to fix before training"
    if summary.warnings:
        return f"Ready to train; {pluralize(summary.warnings, 'warning')} to review"
    return "Ready to train: no problems found"


def _numbers(summary: Summary) -> str:
    numbers = {"rows": summary.rows}
    numbers |= {"images": summary.images} if summary.images else {}
    numbers |= {"videos": summary.videos} if summary.videos else {}
    numbers |= {"errors": summary.errors, "warnings": summary.warnings, "infos": summary.infos}
    return "".join(
        f'<div class="number {name if number else "none"}"><dt>{name}</dt><dd>{number:,}</dd></div>'
        for name, number in numbers.items()
    )


def _level_buttons(summary: Summary) -> Iterator[str]:
    counts = {"error": summary.errors, "warning": summary.warnings, "info": summary.infos}
    for level in LEVELS:
        yield (
            f'<button type="button" class="level" data-level="{level}" aria-pressed="false">'
            f'<i class="dot {level}"></i>{level} <span class="n">{counts[level]:,}</span></button>'
        )


def _code_buttons(summary: Summary) -> Iterator[str]:
    """Yield the codes found, by subject, each with its count and explanation."""
    for subject, title in SUBJECTS.items():
        codes = [code for code in summary.codes if CODES[code].subject == subject]
        if not codes:
            continue
        yield f"<h3>{escape(title)}</h3><ul>"
        for code in codes:
            yield (
                f'<li><button type="button" class="code" data-code="{code}" aria-pressed="false">'
                f'<i class="dot {CODES[code].level}"></i><span class="name">{code}</span>'
                f'<span class="n">{summary.codes[code]:,}</span>'
                f"<small>{_with_code(CODES[code].explanation)}</small></button></li>"
            )
        yield "</ul>"


def _with_code(text: str) -> str:
    """Turn text in backticks into code elements, like `withCode` of the script."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(text))


def _held(data: PageData, summary: Summary) -> str:
    """Return what the bounded page contains, of how much."""
    text = f"This page contains {data.findings} findings, {data.samples} samples"
    text += f" and {data.thumbnails} thumbnails" if summary.decoded else "; files were not decoded"
    text += f" ({format_bytes(len(data.json))})"
    complete = all(one.held == one.of for one in (data.findings, data.samples, data.thumbnails))
    return text if complete else f"{text}; samples with findings come first"

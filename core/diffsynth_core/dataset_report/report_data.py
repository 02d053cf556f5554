"""Data for the script of the report page: findings, samples with crops, thumbnails, all bounded. No torch.

A page must open in a browser for any dataset: each of the three parts has a budget in bytes. The worst comes first, so
that a budget cuts off what matters least; how much was omitted is stated.
"""

from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from diffsynth_core.data.findings import LEVELS, Finding
from diffsynth_core.data.media import MediaCrop
from diffsynth_core.data.records import Record
from diffsynth_core.dataset_report.dataset_facts import DatasetFacts
from diffsynth_core.dataset_report.facts import ImageFacts, VideoFacts
from diffsynth_core.dataset_report.report import Report
from diffsynth_core.dataset_report.set_checks import crop_box, header_of, sizes_of
from diffsynth_core.errors import truncate
from diffsynth_core.html_page.document import json_for_script

FINDINGS_BYTES = 8_000_000
"""Maximum bytes of findings as JSON."""
SAMPLES_BYTES = 8_000_000
"""Maximum bytes of samples as JSON."""
THUMBNAILS_BYTES = 16_000_000
"""Maximum bytes of thumbnails as JSON."""
SHOWN_CHARACTERS = 300
"""Maximum number of characters of a caption or a missing path: a cell may contain a whole caption."""


@dataclass(frozen=True)
class ShownCount:
    """How many items the page contains, of how many."""

    held: int
    of: int

    def __str__(self) -> str:
        if not self.of:
            return "no"
        return f"all {self.of:,}" if self.held == self.of else f"{self.held:,} of {self.of:,}"


@dataclass(frozen=True)
class PageData:
    """JSON for a script element, and what it contains."""

    json: str
    findings: ShownCount
    samples: ShownCount
    thumbnails: ShownCount


def page_data(report: Report, dataset: DatasetFacts) -> PageData:
    """Return what the page shows item by item: the worst findings, samples with findings before those without."""
    findings = _within(FINDINGS_BYTES, (json_for_script(_finding(one, dataset)) for one in report.findings))
    records = _worst_first(dataset, report.findings)
    sizes = sizes_of(dataset)
    samples = _within(SAMPLES_BYTES, (json_for_script(_sample(record, dataset, sizes)) for record in records))
    images = thumbnails_of(dataset)
    shown = {name: images[name] for record in records[: len(samples)] for name in _names(record) if name in images}
    thumbnails = _within(THUMBNAILS_BYTES, (f"{json_for_script(name)}:{_base64(one)}" for name, one in shown.items()))
    text = (
        f'{{"findings":[{",".join(findings)}],"samples":[{",".join(samples)}],"thumbnails":{{{",".join(thumbnails)}}}}}'
    )
    return PageData(
        text,
        ShownCount(len(findings), len(report.findings)),
        ShownCount(len(samples), len(records)),
        ShownCount(len(thumbnails), len(images)),
    )


def _finding(finding: Finding, dataset: DatasetFacts) -> dict[str, Any]:
    """Return a finding for the page."""
    path = None if finding.path is None else _shown_path(finding.path, dataset)
    return asdict(replace(finding, path=path))


def thumbnails_of(dataset: DatasetFacts) -> Mapping[str, bytes]:
    """Return JPEGs by path."""
    every: dict[str, ImageFacts | VideoFacts] = {**dataset.images, **dataset.videos}
    return {name: facts.thumbnail for name, facts in every.items() if facts.thumbnail}


def _base64(data: bytes) -> str:
    return f'"{b64encode(data).decode()}"'


def _within(budget: int, texts: Iterable[str]) -> list[str]:
    """Return the first texts that fit into the budget."""
    taken = []
    for text in texts:
        budget -= len(text) + 1
        if budget < 0:
            break
        taken.append(text)
    return taken


def _worst_first(dataset: DatasetFacts, findings: Iterable[Finding]) -> list[Record]:
    """Return the rows with errors, those with warnings, and so on, each in order; then those without findings."""
    worst: dict[int, int] = {}
    for finding in findings:
        if finding.row is not None:
            level = LEVELS.index(finding.level)
            worst[finding.row] = min(level, worst.get(finding.row, level))
    return sorted(dataset.rows.records, key=lambda record: (worst.get(record.row, len(LEVELS)), record.row))


def _names(record: Record) -> Iterator[str]:
    for names in record.files.values():
        yield from names


def _sample(record: Record, dataset: DatasetFacts, sizes: Mapping[int, MediaCrop]) -> dict[str, Any]:
    """Return a row for the page.

    `files`: [column, path], the target first. `width`, `height`: of the target in pixels. `crop`: [left, top, width,
    height] of the part used in training, as fractions of the sides. `size`: the resulting [width, height, frames].
    `lost`: the fraction that is cropped away.
    """
    target = dataset.rows.columns.target
    columns = sorted(record.files, key=lambda column: column != target)
    sample: dict[str, Any] = {
        "row": record.row,
        "caption": None if record.caption is None else truncate(record.caption, SHOWN_CHARACTERS),
        "files": [[column, _shown_path(name, dataset)] for column in columns for name in record.files[column]],
    }
    names = record.files.get(target, ())
    header = header_of(dataset, names[0]) if names else None
    if header is None:
        return sample
    sample |= {"width": header.width, "height": header.height}
    crop = sizes.get(record.row)
    if crop is None:
        return sample
    box = crop_box(header, crop)
    wide, high = (box.right - box.left) / header.width, (box.bottom - box.top) / header.height
    shares = (box.left / header.width, box.top / header.height, wide, high)
    return sample | {
        "crop": [round(share, 4) for share in shares],
        "size": [crop.width, crop.height, crop.frames],
        "lost": round(1 - wide * high, 4),
    }


def _shown_path(name: str, dataset: DatasetFacts) -> str:
    """Return a path for the page; that of a file is not truncated, because its thumbnail is looked up by it."""
    return name if name in dataset.rows.present else truncate(name, SHOWN_CHARACTERS)

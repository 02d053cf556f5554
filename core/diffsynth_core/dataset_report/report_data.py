"""What the script in the page of a report reads: findings, samples with their crops, thumbnails, all bounded. No torch.

A page must open in a browser whatever the dataset: each of the three parts has a budget in bytes. What is worst comes
first, so that a budget cuts off what matters least; how much was left out is told.
"""

import json
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from diffsynth_core.data.media import Excerpt
from diffsynth_core.dataset_report.examined import Examined, Record
from diffsynth_core.dataset_report.facts import ImageFacts, VideoFacts
from diffsynth_core.dataset_report.findings import LEVELS, Finding, Report
from diffsynth_core.dataset_report.set_checks import crop_of, header_of, sizes_of
from diffsynth_core.errors import truncate

FINDINGS_BYTES = 8_000_000
SAMPLES_BYTES = 8_000_000
THUMBNAILS_BYTES = 16_000_000
"""The most that each part takes of the page, as JSON."""
SHOWN_CHARACTERS = 300
"""What is shown of a caption, or of the path of a file that is not there: a cell may hold a whole caption instead."""


@dataclass(frozen=True)
class Held:
    """How many of a thing the page holds, of how many."""

    held: int
    of: int

    def __str__(self) -> str:
        if not self.of:
            return "no"
        return f"all {self.of:,}" if self.held == self.of else f"{self.held:,} of {self.of:,}"


@dataclass(frozen=True)
class PageData:
    """JSON that may stand in a script element, and what it holds."""

    json: str
    findings: Held
    samples: Held
    thumbnails: Held


def page_data(report: Report, examined: Examined) -> PageData:
    """What the page shows one by one: the worst findings, samples with findings before those without."""
    findings = _within(FINDINGS_BYTES, (_as_json(_finding(one, examined)) for one in report.findings))
    records = _worst_first(examined, report.findings)
    sizes = sizes_of(examined)
    samples = _within(SAMPLES_BYTES, (_as_json(_sample(record, examined, sizes)) for record in records))
    images = thumbnails_of(examined)
    shown = {name: images[name] for record in records[: len(samples)] for name in _names(record) if name in images}
    thumbnails = _within(THUMBNAILS_BYTES, (f"{_as_json(name)}:{_base64(one)}" for name, one in shown.items()))
    text = (
        f'{{"findings":[{",".join(findings)}],"samples":[{",".join(samples)}],"thumbnails":{{{",".join(thumbnails)}}}}}'
    )
    return PageData(
        text,
        Held(len(findings), len(report.findings)),
        Held(len(samples), len(records)),
        Held(len(thumbnails), len(images)),
    )


def _finding(finding: Finding, examined: Examined) -> dict[str, Any]:
    """A finding as the page shows it."""
    path = None if finding.path is None else _shown_path(finding.path, examined)
    return asdict(replace(finding, path=path))


def thumbnails_of(examined: Examined) -> Mapping[str, bytes]:
    """JPEGs by path."""
    every: dict[str, ImageFacts | VideoFacts] = {**examined.images, **examined.videos}
    return {name: facts.thumbnail for name, facts in every.items() if facts.thumbnail}


def _as_json(value: Any) -> str:
    """JSON in ASCII that neither ends a script element nor begins a comment, whatever the texts in it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _base64(data: bytes) -> str:
    return f'"{b64encode(data).decode()}"'


def _within(budget: int, texts: Iterable[str]) -> list[str]:
    """The first texts, as many as have room."""
    taken = []
    for text in texts:
        budget -= len(text) + 1
        if budget < 0:
            break
        taken.append(text)
    return taken


def _worst_first(examined: Examined, findings: Iterable[Finding]) -> list[Record]:
    """The rows with errors, those with warnings, and so on, each in their order; then those without findings."""
    worst: dict[int, int] = {}
    for finding in findings:
        if finding.row is not None:
            level = LEVELS.index(finding.level)
            worst[finding.row] = min(level, worst.get(finding.row, level))
    return sorted(examined.records, key=lambda record: (worst.get(record.row, len(LEVELS)), record.row))


def _names(record: Record) -> Iterator[str]:
    for names in record.files.values():
        yield from names


def _sample(record: Record, examined: Examined, sizes: Mapping[int, Excerpt]) -> dict[str, Any]:
    """A row as the page shows it.

    `files`: [column, path], that of what is trained on first. `width`, `height`: of that file, in pixels.
    `crop`: [left, top, width, height] of what training sees of it, as shares of the file's sides.
    `size`: [width, height, frames] that this becomes. `lost`: the share that is cut away.
    """
    target = examined.columns.target
    columns = sorted(record.files, key=lambda column: column != target)
    sample: dict[str, Any] = {
        "row": record.row,
        "caption": None if record.caption is None else truncate(record.caption, SHOWN_CHARACTERS),
        "files": [[column, _shown_path(name, examined)] for column in columns for name in record.files[column]],
    }
    names = record.files.get(target, ())
    header = header_of(examined, names[0]) if names else None
    if header is None:
        return sample
    sample |= {"width": header.width, "height": header.height}
    excerpt = sizes.get(record.row)
    if excerpt is None:
        return sample
    crop = crop_of(header, excerpt)
    wide, high = (crop.right - crop.left) / header.width, (crop.bottom - crop.top) / header.height
    shares = (crop.left / header.width, crop.top / header.height, wide, high)
    return sample | {
        "crop": [round(share, 4) for share in shares],
        "size": [excerpt.width, excerpt.height, excerpt.frames],
        "lost": round(1 - wide * high, 4),
    }


def _shown_path(name: str, examined: Examined) -> str:
    """A path as the page shows it; that of a file stays whole, for its thumbnail is found by it."""
    return name if name in examined.present else truncate(name, SHOWN_CHARACTERS)

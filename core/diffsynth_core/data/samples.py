"""Samples: rows of the metadata checked, with their files found and their training size known. No torch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth_core.data.media import Excerpt, MediaHeader, MediaRule, choose_excerpt, read_media_header
from diffsynth_core.data.metadata import Metadata
from diffsynth_core.data.video_memory import VideoMemory
from diffsynth_core.errors import DiffSynthError, Problem, shorten, suggest
from diffsynth_core.progress import Reporter

HEADER_THREADS = 8
"""Headers are small reads; on a network disk waiting for them one by one is what takes the time."""

SHOWN_CUT_CLIPS = 5
RATE_SPREAD = 1.1
"""Frame rates that differ by more are worth a word."""


@dataclass(frozen=True)
class Sample:
    """One row: its number, its caption, and what of its files is trained on, by column."""

    row: int
    caption: str
    media: Mapping[str, Excerpt]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, height in pixels, width in pixels)."""
        return next(iter(self.media.values())).shape

    @property
    def name(self) -> str:
        """How messages name the sample."""
        return f"row {self.row} `{next(iter(self.media.values())).path}`"


@dataclass(frozen=True)
class SampleSet:
    """All samples of a dataset, and what is worth saying of them once."""

    samples: tuple[Sample, ...]
    notes: tuple[str, ...]


def check_columns(
    metadata: Metadata, text_column: str, media_column: str, data_file_keys: Sequence[str]
) -> list[Problem]:
    """Columns that the family needs and the metadata, or `data_file_keys`, lacks."""
    problems = []
    for column in (media_column, text_column):
        if column not in metadata.columns:
            near = suggest(column, metadata.columns)
            hint = f"rename `{near}`" if near else "add the column"
            problems.append(
                Problem(f"`{metadata.origin}` has no column `{column}`; it has {shorten(metadata.columns)}", hint)
            )
    if media_column not in data_file_keys:
        problems.append(
            Problem(
                f"`data_file_keys` leaves out `{media_column}`, whose files this family trains on",
                f"add `{media_column}`",
                wrong_use=True,
            )
        )
    return problems


def build_samples(
    metadata: Metadata,
    base: Path,
    text_column: str,
    media_column: str,
    rule: MediaRule,
    videos: VideoMemory,
    reporter: Reporter,
) -> tuple[SampleSet, list[Problem]]:
    """The samples of a dataset, and the rows that cannot be trained on."""
    problems: list[Problem] = []
    rows: list[_Row] = []
    for number, row in enumerate(metadata.rows, start=1):
        where = f"`{metadata.origin}` row {number}"
        try:
            caption = _caption(row.get(text_column), text_column, where)
            rows.append(_Row(number, where, caption, _media_path(row.get(media_column), media_column, base, where)))
        except DiffSynthError as error:
            problems += error.problems
    return _measure(rows, media_column, rule, videos, problems, reporter)


@dataclass(frozen=True)
class _Row:
    """A row whose file is there but not yet looked into."""

    number: int
    where: str
    caption: str
    path: Path


def _measure(
    rows: list[_Row],
    column: str,
    rule: MediaRule,
    videos: VideoMemory,
    problems: list[Problem],
    reporter: Reporter,
) -> tuple[SampleSet, list[Problem]]:
    """Read the headers of all files and settle the sizes and frames that are trained on."""
    samples = []
    headers = []
    label, unit = ("Counting frames", "videos") if rule.frames else ("Reading picture headers", "pictures")
    alone = videos.alone() if rule.frames else nullcontext()
    with alone, reporter.task(label, len(rows), unit) as task, ThreadPoolExecutor(HEADER_THREADS) as pool:
        found = pool.map(lambda row: _header_or_problem(row.path, rule, videos), rows)
        for row, header in zip(rows, found, strict=True):
            task.advance()
            if isinstance(header, Problem):
                problems.append(Problem(f"{row.where}: {header.message}", header.hint))
                continue
            excerpt = choose_excerpt(row.path, header, rule, row.number)
            factor = rule.size.factor
            if min(excerpt.height, excerpt.width) < factor or min(header.height, header.width) < factor:
                problems.append(_too_small(row, header, rule))
                continue
            headers.append(header)
            samples.append(Sample(row.number, row.caption, {column: excerpt}))
    return SampleSet(tuple(samples), tuple(_notes(samples, headers, rule))), problems


def _notes(samples: list[Sample], headers: list[MediaHeader], rule: MediaRule) -> Iterator[str]:
    """What is worth saying once of how files are changed on their way to the model."""
    kind = "videos and pictures" if rule.frames else "pictures"
    of_all = f"of {len(samples)} {kind}"
    if rotated := sum(header.rotated for header in headers):
        yield f"{rotated} {of_all} are turned upright as their {'metadata' if rule.frames else 'EXIF orientation'} says"
    if transparent := sum(header.transparent for header in headers):
        yield f"{transparent} {of_all} have transparency, which is composed on white"
    if rule.frames is None:
        return
    rates = [header.frame_rate for header in headers if header.frame_rate]
    if rule.frames.frame_rate is None and rates and max(rates) > RATE_SPREAD * min(rates):
        yield (
            f"the videos have {min(rates):g} to {max(rates):g} frames per second, and each frame counts as the next "
            "step in time: `--frame_rate` trains all of them at one speed"
        )
    short = [
        (sample, header.frames)
        for sample, header in zip(samples, headers, strict=True)
        if header.video and sample.shape[0] < rule.frames.num_frames
    ]
    if not short:
        return
    cut = [(sample, frames) for sample, frames in short if sample.shape[0] < frames]
    shown = ", ".join(
        f"row {sample.row} from {frames} to {sample.shape[0]}" for sample, frames in cut[:SHOWN_CUT_CLIPS]
    )
    more = f" and {len(cut) - SHOWN_CUT_CLIPS} more" if len(cut) > SHOWN_CUT_CLIPS else ""
    told = f", {len(cut)} of which are cut to {rule.frames.step}n + 1: {shown}{more}" if cut else ""
    yield f"{len(short)} {of_all} are shorter than {rule.frames.num_frames} frames{told}"


def _header_or_problem(path: Path, rule: MediaRule, videos: VideoMemory) -> MediaHeader | Problem:
    try:
        return read_media_header(path, rule, videos)
    except DiffSynthError as error:
        return error.problems[0]


def _too_small(row: _Row, header: MediaHeader, rule: MediaRule) -> Problem:
    kind, factor = "video" if header.video else "picture", rule.size.factor
    size = f"{row.where}: `{row.path}` is {header.width} x {header.height} pixels"
    if min(header.width, header.height) < factor:
        return Problem(
            f"{size}; a side is below the least of {factor}",
            f"replace the {kind} or take its row out",
        )
    return Problem(
        f"{size}; with `max_pixels` {rule.size.max_pixels} a side falls below the least of {factor}",
        f"replace the {kind}, take its row out, or raise `max_pixels`",
    )


def _caption(value: Any, column: str, where: str) -> str:
    """The caption as it stands; an empty cell is an empty caption."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if not isinstance(value, str):
        raise DiffSynthError(
            f"{where}: column `{column}` holds `{json.dumps(value)}`, expected a text", "write the caption as a text"
        )
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DiffSynthError(f"{where}: column `{column}` holds half a character", "mend the caption")
    return value


def _media_path(value: Any, column: str, base: Path, where: str) -> Path:
    """The one file a cell names, below `base`."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(json.JSONDecodeError):  # a file name may begin with a bracket
            value = json.loads(value)
    if isinstance(value, list):
        if len(value) != 1:
            raise DiffSynthError(
                f"{where}: column `{column}` lists {len(value)} files, expected one", "write one row per file"
            )
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise DiffSynthError(f"{where}: column `{column}` is empty", "name the file, or take the row out")
    path = base / value.strip()
    if not path.is_file():
        raise DiffSynthError(
            f"{where}: column `{column}` names `{path}`, which is not there",
            "correct the path (relative to `dataset_base_path`), or take the row out",
        )
    return path

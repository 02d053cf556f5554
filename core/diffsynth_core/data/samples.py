"""Samples: checked rows with their files and training sizes. No torch."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path

from diffsynth_core.data.color import Colors
from diffsynth_core.data.conditions import Columns, Condition
from diffsynth_core.data.formats import CLIP_ENDINGS
from diffsynth_core.data.images import ImageHeader, read_image_header
from diffsynth_core.data.media import (
    MediaCrop,
    MediaHeader,
    MediaRule,
    choose_reference,
    choose_target,
    read_media_header,
    scale_of,
)
from diffsynth_core.data.resolution import MAX_UPSCALE, MIN_AREA_SHARE
from diffsynth_core.data.rows import Rows
from diffsynth_core.data.sampling import Sampling
from diffsynth_core.data.video_probe_cache import VideoProbeCache
from diffsynth_core.errors import DiffSynthError, Problem, list_names
from diffsynth_core.progress import Reporter, pluralize, verb

HEADER_THREADS = 8
"""Headers are small reads: on a network disk, latency dominates."""
MOST_AT_ONCE = 64
"""Maximum number of rows passed to a thread at once, because passing costs more than reading a header."""

LOW_RESOLUTION_HINT = "use larger files, or lower `--max_pixels` to train at a small size on purpose"
"""Hint for files much smaller than the usual training size."""
SHOWN_CUT_CLIPS = 5
"""Maximum number of truncated clips in a note."""
RATE_SPREAD = 1.1
"""Minimum difference of frame rates that is noted."""
SHAPE_SPREAD = 1.02
"""Tolerance of aspect ratios, for sizes rounded to multiples of 16."""


@dataclass(frozen=True)
class Sample:
    """One row: its number, caption, target, and conditions by name.

    Attributes:
        sampling: parameters of the few-step sampler, for distillation.
        values: numbers and texts that are conditions, by column.
        other_captions: captions besides `caption`, of which each draw of the sample takes one (data/captions.py).
        with_empty_caption: a draw may also take the empty caption (`--caption_dropout`).
    """

    row: int
    caption: str
    target: MediaCrop
    conditions: Mapping[str, tuple[MediaCrop, ...]] = field(default_factory=dict)
    sampling: Sampling | None = None
    other_captions: tuple[str, ...] = ()
    values: Mapping[str, float | str] = field(default_factory=dict)
    with_empty_caption: bool = False

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions."""
        return self.caption, *self.other_captions

    @property
    def choices(self) -> tuple[str, ...]:
        """All texts that a draw of the sample may take, by choice: its captions, then possibly the empty one."""
        return (*self.captions, "") if self.with_empty_caption else self.captions

    @property
    def bucket(self) -> Hashable:
        """Key that is equal for samples that can be in one batch."""
        return self.shape if self.sampling is None else (self.shape, self.sampling.steps)

    @property
    def shape(self) -> tuple[tuple[int, int, int], ...]:
        """(frames, height, width) in pixels of the target, then of each condition."""
        shown = (crop.shape for crops in self.conditions.values() for crop in crops)
        return self.target.shape, *shown

    @property
    def frames(self) -> int:
        """Number of frames of the target."""
        return self.target.frames

    @property
    def files(self) -> tuple[Path, ...]:
        """All media files of the sample."""
        shown = (crop.path for crops in self.conditions.values() for crop in crops)
        return tuple(dict.fromkeys((self.target.path, *shown)))

    @property
    def name(self) -> str:
        """Name for messages."""
        return f"row {self.row} `{self.target.path}`"


@dataclass(frozen=True)
class SampleSet:
    """All samples of a dataset, with notes and warnings."""

    samples: tuple[Sample, ...]
    notes: tuple[str, ...]
    warnings: tuple[Problem, ...] = ()


def build_samples(
    rows: Rows, rule: MediaRule, videos: VideoProbeCache, reporter: Reporter
) -> tuple[SampleSet, list[Problem]]:
    """Return the samples of a dataset, and the problems of unusable files; rows with an error are omitted.

    Args:
        rule: how files become targets.
    """
    base, faulty, columns = rows.metadata.base, rows.faulty, rows.columns
    shown = dict.fromkeys(condition.column for condition in columns.conditions)
    found = [
        _Row(
            row,
            f"`{rows.metadata.origin}` row {row}",
            caption or "",
            base / files[columns.target][0],
            {name: tuple(base / path for path in files.get(name, ())) for name in shown},
            rows.sampling.get(row),
            rows.values.get(row, {}),
        )
        for row, caption, files in rows.records
        if row not in faulty
    ]
    return _measure(found, columns, rule, videos, reporter)


@dataclass(frozen=True)
class _Row:
    """A row whose files exist but have not been read; `shown` are those of conditions."""

    number: int
    where: str
    caption: str
    target: Path
    shown: Mapping[str, tuple[Path, ...]]
    sampling: Sampling | None
    values: Mapping[str, float | str]


@dataclass(frozen=True)
class _Headers:
    """Headers of a row's files."""

    target: MediaHeader
    shown: Mapping[str, tuple[ImageHeader | MediaHeader, ...]]


def _measure(
    rows: list[_Row], columns: Columns, rule: MediaRule, videos: VideoProbeCache, reporter: Reporter
) -> tuple[SampleSet, list[Problem]]:
    """Read the headers of all files, and determine the sizes and frames to use."""
    problems: list[Problem] = []
    samples: list[Sample] = []
    headers: list[_Headers] = []
    label, unit = ("Counting frames", "videos") if rule.frames else ("Reading image headers", "samples")
    alone = videos.exclusive() if rule.frames else nullcontext()
    of_image = cache(read_image_header)  # cached, because many rows may use one image

    def of_condition(column: str, path: Path) -> ImageHeader | MediaHeader:
        return read_media_header(path, rule, videos) if column in columns.clips else of_image(path)

    with alone, reporter.task(label, len(rows), unit) as task, ThreadPoolExecutor(HEADER_THREADS) as pool:
        found = pool.map(
            lambda some: [_headers_or_problem(row, rule, videos, of_condition) for row in some],
            _portions(rows, 1 if rule.frames else MOST_AT_ONCE),
        )
        for row, read in zip(rows, chain.from_iterable(found), strict=True):
            task.advance()
            sample = read if isinstance(read, Problem) else _choose(row, read, columns, rule)
            if isinstance(sample, Problem):
                problems.append(sample)
            elif not isinstance(read, Problem):
                samples.append(sample)
                headers.append(read)
    notes = (*_notes(samples, headers, rule), *_other_shapes(headers, columns))
    warnings = (*_scaled_up(samples, headers, columns, rule), *_low_resolution(samples, headers, rule))
    return SampleSet(tuple(samples), notes, warnings), problems


def _portions(rows: list[_Row], most: int) -> list[list[_Row]]:
    """Split rows for threads: into portions small enough to keep all threads busy to the end."""
    size = max(1, min(most, len(rows) // (4 * HEADER_THREADS)))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _choose(row: _Row, headers: _Headers, columns: Columns, rule: MediaRule) -> Sample | Problem:
    """Return the sample of a row, or the problem of a file that is too small."""
    target, factor = choose_target(row.target, headers.target, rule, row.number), rule.size.factor
    if min(target.height, target.width) < factor or min(headers.target.height, headers.target.width) < factor:
        return _too_small(row, headers.target, rule)
    conditions = {}
    for condition in columns.conditions:
        found = list(zip(row.shown[condition.column], headers.shown[condition.column], strict=True))
        crops = [choose_reference(path, header, condition, target, rule.size.max_pixels) for path, header in found]
        for crop, (_, header) in zip(crops, found, strict=True):
            if problem := _condition_problem(row, condition, crop, header, target):
                return problem
        conditions[condition.name] = tuple(crops)
    return Sample(row.number, row.caption, target, conditions, row.sampling, values=row.values)


def _condition_problem(
    row: _Row, condition: Condition, crop: MediaCrop, header: ImageHeader | MediaHeader, target: MediaCrop
) -> Problem | None:
    """Return the problem of a file of a condition that is too small, or shorter than the target."""
    named = f"{row.where}: column `{condition.column}` names `{crop.path}`"
    if not crop.height or not crop.width:
        return Problem(
            f"{named}, which is too small or too narrow as a reference image of this model",
            "replace the image or remove its row",
            code="IMAGE_TOO_SMALL",
        )
    frames, end = header.frames if isinstance(header, MediaHeader) else 1, target.start + target.frames
    if condition.media == "video" and frames < end:
        return Problem(
            f"{named}, which has {pluralize(frames, 'frame')}, but the frames of its target end at {end}",
            "use a video as long as the target, or remove the row",
            code="VIDEO_TOO_SHORT",
        )
    return None


def _notes(samples: list[Sample], read: list[_Headers], rule: MediaRule) -> Iterator[str]:
    """Yield notes about how files are changed."""
    targets = [headers.target for headers in read]
    shown = [header for headers in read for images in headers.shown.values() for header in images]
    headers: list[MediaHeader | ImageHeader] = [*targets, *shown]
    of_all = f"of {_count_files(len(headers), rule)}"
    if rotated := sum(header.rotated for header in headers):
        yield f"{'rotation metadata' if rule.frames else 'EXIF orientation'} is applied to {rotated} {of_all}"
    if transparent := sum(header.transparent for header in headers):
        yield f"{transparent} {of_all} {verb(transparent, 'has transparency and is', 'have transparency and are')} composited on white"
    yield from _color_notes([header.colors for header in headers], of_all)
    if paged := sum(header.pages > 1 for header in headers):
        yield f"{paged} {of_all} {verb(paged, 'has', 'have')} several pages; the first one is used"
    if rule.frames is None:
        return
    rates = [header.frame_rate for header in targets if header.frame_rate]
    if rule.frames.frame_rate is None and rates and max(rates) > RATE_SPREAD * min(rates):
        yield (
            f"the videos have {min(rates):g} to {max(rates):g} frames per second, and their frames are used "
            "unchanged: pass `--frame_rate` to resample all of them to one speed"
        )
    short = [
        (sample, header.frames)
        for sample, header in zip(samples, targets, strict=True)
        if header.video and sample.frames < rule.frames.num_frames
    ]
    if not short:
        return
    cut = [(sample, frames) for sample, frames in short if sample.frames < frames]
    listed = ", ".join(f"row {sample.row} from {frames} to {sample.frames}" for sample, frames in cut[:SHOWN_CUT_CLIPS])
    more = f" and {len(cut) - SHOWN_CUT_CLIPS} more" if len(cut) > SHOWN_CUT_CLIPS else ""
    truncated = (
        f", {len(cut)} of which {verb(len(cut), 'is', 'are')} cut to {rule.frames.step}n + 1: {listed}{more}"
        if cut
        else ""
    )
    yield (
        f"{len(short)} of {_count_files(len(targets), rule)} {verb(len(short), 'is', 'are')} shorter than "
        f"{rule.frames.num_frames} frames{truncated}"
    )


def _color_notes(colors: list[Colors], of_all: str) -> Iterator[str]:
    """Yield notes about color profiles and marks of other color spaces than sRGB."""
    profiles = list(dict.fromkeys(one.profile for one in colors if one.profile))
    if profiles:
        number = sum(bool(one.profile) for one in colors)
        yield f"{number} {of_all} {verb(number, 'is', 'are')} converted to sRGB from {list_names(profiles, 3)}"
    doubts = [one.doubt for one in colors if one.doubt]
    if doubts:
        yield f"the colors of {len(doubts)} {of_all} are treated as sRGB (first: {doubts[0]})"


def _scaled_up(samples: list[Sample], read: list[_Headers], columns: Columns, rule: MediaRule) -> Iterator[Problem]:
    """Return how many files are upscaled, and by how much at most."""
    scaled: list[tuple[float, Sample, MediaCrop, MediaHeader | ImageHeader]] = []
    for sample, headers in zip(samples, read, strict=True):
        pairs: list[tuple[MediaCrop, MediaHeader | ImageHeader]] = [(sample.target, headers.target)]
        for condition in columns.conditions:
            pairs += zip(sample.conditions[condition.name], headers.shown[condition.column], strict=True)
        scaled += [(scale_of(crop, one.width, one.height), sample, crop, one) for crop, one in pairs]
    small = [one for one in scaled if one[0] > MAX_UPSCALE]
    if small:
        factor, sample, crop, header = max(small, key=lambda one: one[0])
        size = "x".join(str(side) for side in (crop.scaled or (crop.height, crop.width))[::-1])
        yield Problem(
            f"{len(small)} of {_count_files(len(scaled), rule)} {verb(len(small), 'is', 'are')} upscaled, "
            f"up to {factor:.3g}x: row {sample.row} "
            f"`{crop.path}` from {header.width}x{header.height} to {size}",
            "use larger files, or train at a smaller size",
            code="IMAGE_UPSCALED",
        )


def _low_resolution(samples: list[Sample], read: list[_Headers], rule: MediaRule) -> Iterator[Problem]:
    """Yield a warning about files much smaller than the usual training size."""
    areas = [headers.target.width * headers.target.height for headers in read]
    least = MIN_AREA_SHARE * rule.usual_pixels
    small = [place for place, area in enumerate(areas) if area < least]
    if small:
        place = min(small, key=areas.__getitem__)
        sample, header = samples[place], read[place].target
        yield Problem(
            f"{len(small)} of {_count_files(len(areas), rule)} {verb(len(small), 'is', 'are')} far below the usual training size of "
            f"{rule.usual_pixels:,} pixels: row {sample.row} `{sample.target.path}` is {header.width}x{header.height}",
            LOW_RESOLUTION_HINT,
            code="IMAGE_LOW_RESOLUTION",
        )


def _count_files(number: int, rule: MediaRule) -> str:
    return pluralize(number, "video or image", "videos and images") if rule.frames else pluralize(number, "image")


def _other_shapes(read: list[_Headers], columns: Columns) -> Iterator[str]:
    """Yield a note about conditions that are to overlay the target but have another aspect ratio."""
    for column in [condition.column for condition in columns.conditions if condition.aligned]:
        pairs = [(headers.target, image) for headers in read for image in headers.shown[column]]
        ratios = [image.width * target.height / (image.height * target.width) for target, image in pairs]
        other = sum(not 1 / SHAPE_SPREAD < ratio < SHAPE_SPREAD for ratio in ratios)
        if other:
            yield (
                f"{other} of {pluralize(len(pairs), 'image')} of `{column}` {verb(other, 'has', 'have')} another aspect ratio than the target: "
                f"scaled and center-cropped to its size, {verb(other, 'it does', 'they do')} not align with it"
            )


def _headers_or_problem(
    row: _Row,
    rule: MediaRule,
    videos: VideoProbeCache,
    of_condition: Callable[[str, Path], ImageHeader | MediaHeader],
) -> _Headers | Problem:
    """Return the headers of a row's files, or the problem of the first unreadable one."""
    try:
        shown = {name: tuple(of_condition(name, path) for path in paths) for name, paths in row.shown.items()}
        return _Headers(read_media_header(row.target, rule, videos), shown)
    except DiffSynthError as error:
        (problem,) = error.problems
        unreadable = "VIDEO_UNREADABLE" if row.target.suffix.lower() in CLIP_ENDINGS else "IMAGE_UNREADABLE"
        return Problem(f"{row.where}: {problem.message}", problem.hint, code=problem.code or unreadable)


def _too_small(row: _Row, header: MediaHeader, rule: MediaRule) -> Problem:
    kind, factor = "video" if header.video else "image", rule.size.factor
    size = f"{row.where}: `{row.target}` is {header.width} x {header.height} pixels"
    if min(header.width, header.height) < factor:
        return Problem(
            f"{size}; a side is below the minimum of {factor}",
            f"replace the {kind} or remove its row",
            code="IMAGE_TOO_SMALL",
        )
    return Problem(
        f"{size}; with `max_pixels` {rule.size.max_pixels} a side falls below the minimum of {factor}",
        f"replace the {kind}, remove its row, or raise `max_pixels`",
        code="IMAGE_TOO_SMALL",
    )

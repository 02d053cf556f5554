"""Codes BUCKETS and CACHE_SIZE: facts about the dataset as a whole, for users and for the report page. No torch.

`sizes_of` returns the training size of each row with the arithmetic of training (data/media.py); the histogram of
buckets, their batches and the crops on the page are derived from it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.data.batches import BatchPlan, StepPlan
from diffsynth_core.data.conditions import Condition
from diffsynth_core.data.findings import Finding, finding
from diffsynth_core.data.media import MediaCrop, MediaHeader, choose_reference, choose_target, scale_of
from diffsynth_core.dataset_report.dataset_facts import DatasetFacts
from diffsynth_core.dataset_report.rules import Rules
from diffsynth_core.files import free_bytes
from diffsynth_core.models.encoded_sizes import EncodedSize, Shown, count_text_states, encoded_size
from diffsynth_core.progress import format_bytes, pluralize

SHOWN_SIZES = 8
"""Maximum number of sizes in a message."""
ASSUMED_PRECISION = "bf16"
"""`mixed_precision` of training if unknown: that of GPUs."""
Size = tuple[int, int, int]
"""(frames, height in pixels, width in pixels)"""


@dataclass(frozen=True)
class CropBox:
    """The part of an upright image or video that training uses, in its own pixels, and the resulting size."""

    left: float
    top: float
    right: float
    bottom: float
    width: int
    height: int


def sizes_of(dataset: DatasetFacts) -> dict[int, MediaCrop]:
    """Return row -> crop of the target, without rows whose file is faulty or too small."""
    sizes = {}
    for row, _, files in dataset.rows.records:
        for name in files.get(dataset.rows.columns.target, ())[:1]:
            header = header_of(dataset, name)
            if header is None:
                continue
            crop = choose_target(Path(name), header, dataset.rules.media, row)
            if min(crop.height, crop.width) > 0:
                sizes[row] = crop
    return sizes


def header_of(dataset: DatasetFacts, name: str) -> MediaHeader | None:
    """Return the header of a file as in data/media.py; None if it is faulty or has not been examined."""
    image, video = dataset.images.get(name), dataset.videos.get(name)
    if image and not image.fault:
        rotated = image.orientation != 1
        return MediaHeader(image.width, image.height, 1, False, rotated, image.transparent)
    if video and not video.fault:
        frames = video.frames if video.resampled is None else video.resampled
        return MediaHeader(video.width, video.height, frames, True, video.rotated, False, video.frame_rate)
    return None


def crop_box(header: MediaHeader, crop: MediaCrop) -> CropBox:
    """Return the part of a file that training uses: scaled until it covers the size, then center-cropped."""
    scale = scale_of(crop, header.width, header.height)
    width, height = crop.width / scale, crop.height / scale
    left, top = (header.width - width) / 2, (header.height - height) / 2
    return CropBox(left, top, left + width, top + height, crop.width, crop.height)


def shapes_of(dataset: DatasetFacts) -> dict[int, Shown]:
    """Return row -> size of the target, by its column, and of the conditions, by name.

    Rows with a missing, faulty or too small file are omitted.
    """
    shapes: dict[int, Shown] = {}
    records = {record.row: record for record in dataset.rows.records}
    for row, target in sizes_of(dataset).items():
        sizes: dict[str, tuple[Size, ...]] = {dataset.rows.columns.target: (target.shape,)}
        for condition in dataset.rules.sized_conditions:
            shown = [_shown(dataset, name, condition, target) for name in records[row].files.get(condition.column, ())]
            sizes[condition.name] = tuple(crop.shape for crop in shown if crop)
            if (condition.required and not shown) or not all(shown):
                break
        else:
            shapes[row] = sizes
    return shapes


def _shown(dataset: DatasetFacts, name: str, condition: Condition, target: MediaCrop) -> MediaCrop | None:
    """Return the crop of a condition for `target`; None if there is none."""
    header = header_of(dataset, name)
    if header is None:
        return None
    crop = choose_reference(Path(name), header, condition, target, dataset.rules.media.size.max_pixels)
    return crop if min(crop.height, crop.width) > 0 else None


def check_buckets(dataset: DatasetFacts) -> Iterator[Finding]:
    """Yield BUCKETS: the number of samples of each size, most frequent first; incomplete batches; steps."""
    sizes = list(shapes_of(dataset).values())
    if not sizes:
        return
    rules = dataset.rules
    plan = BatchPlan([tuple(shape.items()) for shape in sizes], rules.repeat, rules.batch_size, seed=0)
    steps = StepPlan(plan, rules.accumulation, num_epochs=1, max_steps=None)
    counted = Counter(shape[dataset.rows.columns.target][0] for shape in sizes)
    listed = ", ".join(f"{count} of {_size(shape)}" for shape, count in counted.most_common(SHOWN_SIZES))
    more = f" and {len(counted) - SHOWN_SIZES} more sizes" if len(counted) > SHOWN_SIZES else ""
    what = f"{pluralize(len(counted), 'training size')}: {listed}{more}; {_steps(rules, steps.steps_per_epoch)}"
    short = [bucket for bucket in plan.buckets if len(bucket.members) * rules.repeat % rules.batch_size]
    if short:
        what += f", the last batch of {len(short)} of {pluralize(len(plan.buckets), 'bucket')} is short"
    yield finding("BUCKETS", what)


def _size(shape: Size) -> str:
    frames, height, width = shape
    return f"{width} x {height}" + (f" x {frames} frames" if frames > 1 else "")


def _steps(rules: Rules, steps: int) -> str:
    """Return the steps of an epoch, and what they are counted for."""
    given = [f"batch size {rules.batch_size}"]
    given += [f"{rules.accumulation} batches a step"] if rules.accumulation > 1 else []
    given += [f"the data repeated {rules.repeat} times"] if rules.repeat > 1 else []
    return f"{pluralize(steps, 'step')} per epoch ({', '.join(given)})"


def check_cache(dataset: DatasetFacts) -> Iterator[Finding]:
    """Yield CACHE_SIZE: disk usage of the encodings of all samples, and whether there is enough space."""
    encoders, cache = dataset.rules.encoders, dataset.rules.cache
    shapes = shapes_of(dataset)
    if not encoders or cache is None or not shapes:
        return
    needed, counted = encoded_bytes(dataset, shapes)
    free = free_bytes(cache)
    how = "" if counted else ", caption tokens estimated from their length"
    what = (
        f"the encodings need about {format_bytes(needed)} in `{cache}` ({format_bytes(needed / len(shapes))} per "
        f"sample{how}), {format_bytes(free)} are free"
    )
    if needed > free:
        hint = "free some space, or choose another folder with `--cache_path`"
        yield finding("CACHE_SIZE", what, hint, level="warning")
    else:
        yield finding("CACHE_SIZE", what)


def encoded_bytes(dataset: DatasetFacts, shapes: Mapping[int, Shown]) -> tuple[int, bool]:
    """Return the estimated bytes of these rows in the cache, and whether their tokens were counted exactly.

    Args:
        shapes: see `shapes_of`.
    """
    rules = dataset.rules
    texts = {record.row: record.caption or "" for record in dataset.rows.records}
    tokenizer = rules.captions.tokenizer if rules.captions else None
    captions = [texts[row] for row in shapes]
    states, counted = count_text_states(rules.encoders, tokenizer, captions, list(shapes.values()))
    step = rules.media.frames.step if rules.media.frames else 1
    each = (
        encoded_size(rules.encoders, {}, text, shown, step) for text, shown in zip(states, shapes.values(), strict=True)
    )
    total = sum(each, EncodedSize())
    return total.bytes_in(ASSUMED_PRECISION), counted

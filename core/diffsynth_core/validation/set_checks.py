"""Codes BUCKETS and CACHE_SIZE: facts of the whole set, for people and for the page of the report. No torch.

`sizes_of` gives the size each row is trained at, by the arithmetic of training (data/media.py); the histogram of
buckets, their batches and the crops of the page are made from it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffsynth_core.data.media import Excerpt, MediaHeader, choose_excerpt
from diffsynth_core.validation.examined import Examined
from diffsynth_core.validation.findings import Finding, found

SHOWN_SIZES = 8


@dataclass(frozen=True)
class Crop:
    """The part of an upright picture or video that training sees, in its own pixels, and the size it becomes."""

    left: float
    top: float
    right: float
    bottom: float
    width: int
    height: int


def sizes_of(examined: Examined) -> dict[int, Excerpt]:
    """Row -> what is trained on of its file; rows whose file is faulty or too small are left out."""
    sizes = {}
    for row, _, files in examined.records:
        for name in files.get(examined.columns.target, ())[:1]:
            header = header_of(examined, name)
            if header is None:
                continue
            excerpt = choose_excerpt(Path(name), header, examined.rules.media, row)
            if min(excerpt.height, excerpt.width) > 0:
                sizes[row] = excerpt
    return sizes


def header_of(examined: Examined, name: str) -> MediaHeader | None:
    """A file as data/media.py knows it; None where it is faulty or has not been looked into."""
    picture, video = examined.pictures.get(name), examined.videos.get(name)
    if picture and not picture.fault:
        rotated = picture.orientation != 1
        return MediaHeader(picture.width, picture.height, 1, False, rotated, picture.transparent)
    if video and not video.fault:
        frames = video.frames if video.resampled is None else video.resampled
        return MediaHeader(video.width, video.height, frames, True, video.rotated, False, video.frame_rate)
    return None


def crop_of(header: MediaHeader, excerpt: Excerpt) -> Crop:
    """What training cuts out of a file: scaled until it covers the size, then cut at the centre."""
    scale = max(excerpt.width / header.width, excerpt.height / header.height)
    width, height = excerpt.width / scale, excerpt.height / scale
    left, top = (header.width - width) / 2, (header.height - height) / 2
    return Crop(left, top, left + width, top + height, excerpt.width, excerpt.height)


def check_buckets(examined: Examined) -> Iterator[Finding]:
    """BUCKETS: how many samples there are of each size, the most frequent first."""
    counted = Counter(excerpt.shape for excerpt in sizes_of(examined).values())
    if not counted:
        return
    listed = ", ".join(
        f"{count} of {width} x {height}" + (f" x {frames} frames" if frames > 1 else "")
        for (frames, height, width), count in counted.most_common(SHOWN_SIZES)
    )
    more = f" and {len(counted) - SHOWN_SIZES} more sizes" if len(counted) > SHOWN_SIZES else ""
    yield found("BUCKETS", f"{len(counted)} training sizes: {listed}{more}")

"""Video files looked into by decoding them: the first frame for the header, then all of them once. No torch.

Facts only; what is wrong with them is said by video_checks.py. The reading is that of training (data/videos.py,
data/decoding.py): which frames count, what is damage, where a file is cut off.
"""

import hashlib
import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffsynth_core.data.decoding import UnreadableVideo
from diffsynth_core.data.videos import read_video_header, watch_video
from diffsynth_core.dataset_report.facts import Fault, VideoFacts
from diffsynth_core.dataset_report.images import thumbnail_of

SKETCH_SIDE = 64
"""Pixels of each side of the small frames that are looked at in place of the whole ones."""
BLOCKS = 16
"""Movement is looked for in the means of so many blocks a side: noise and coding leave those nearly as they are."""
STILL_DIFFERENCE = 12.0
"""How far, of 255, the mean of a block strays from that of the first frame when nothing moves. Measured: noise of 6 of
255, coded until blocks are plainly seen (x264, crf 40), 10; a bright square a twentieth of the image high, 120."""
UNEVEN = 0.3
"""By what share of the median the time between two frames differs in a video of variable rate."""
TICK_SECONDS = 0.0101
"""Times are rounded: the clock of a GIF ticks in hundredths of a second, those of other formats faster."""
RATE_SLACK = 0.02
"""By what share a mean frame rate may be off for the rounding of times."""
KEPT_FRAMES = 32


def examine_video(base: Path, name: str, frame_rate: float | None, thumbnails: int | None) -> VideoFacts:
    """Decode the video `name` below `base` to its end; whatever goes wrong becomes its `fault`.

    `frame_rate`: that of training, in frames per second; None: the file's own. `thumbnails`: the longer side in pixels
    of an image of a frame from the middle; None: none is made.
    """
    path = base / name
    known = VideoFacts(name, 0)
    try:
        known = replace(known, file_bytes=path.stat().st_size, digest=_digest(path))
        return _facts(path, known, frame_rate, thumbnails)
    except UnreadableVideo as error:
        return replace(known, fault=Fault("VIDEO_TRUNCATED" if error.cut_off else "VIDEO_UNREADABLE", error.reason))
    except OSError as error:
        return replace(known, fault=Fault("VIDEO_UNREADABLE", str(error.strerror)))


def _facts(path: Path, known: VideoFacts, frame_rate: float | None, thumbnails: int | None) -> VideoFacts:
    header = read_video_header(path)
    watch = _Watch()
    watched = watch_video(path, frame_rate, max(SKETCH_SIDE, thumbnails or 0), watch.take)
    shortest, longest, variable = spacing(watched.times)
    return replace(
        known,
        width=header.width,
        height=header.height,
        frames=watched.frames,
        resampled=watched.resampled,
        frame_rate=mean_rate(header.frame_rate, watched.times),
        variable_rate=variable,
        spacing=(shortest, longest),
        rotated=header.rotated,
        still=watched.frames > 1 and watch.difference < STILL_DIFFERENCE,
        thumbnail=_thumbnail(watch.middle, header.width, header.height, thumbnails) if thumbnails else None,
    )


def spacing(times: tuple[float, ...]) -> tuple[float, float, bool]:
    """The shortest and the longest time between two frames, in seconds, and whether the times vary."""
    between = [after - before for before, after in pairwise(sorted(times))]
    if not between:
        return 0.0, 0.0, False
    usual = statistics.median(between)
    allowed = max(UNEVEN * usual, TICK_SECONDS)
    return min(between), max(between), max(usual - min(between), max(between) - usual) > allowed


def mean_rate(claimed: float, times: tuple[float, ...]) -> float:
    """Frames per second: what the header says, unless the times of the frames say otherwise."""
    between = max(times) - min(times)
    if not between:
        return claimed
    measured = (len(times) - 1) / between
    return claimed if abs(claimed - measured) < RATE_SLACK * measured else round(measured, 2)


class _Watch:
    """What is kept of a video while its frames go by: how far they stray from the first, and some for a thumbnail."""

    def __init__(self) -> None:
        self.difference = 0.0
        self._first: NDArray[np.int16] | None = None
        self._kept: list[NDArray[np.uint8]] = []
        self._every = 1
        self._seen = 0

    def take(self, frame: NDArray[np.uint8]) -> None:
        """Look at the next frame `[S, S, 3]`, whose memory is used again."""
        small = Image.fromarray(frame).resize((BLOCKS, BLOCKS), Image.Resampling.BOX)
        blocks = np.asarray(small).astype(np.int16)
        if self._first is None:
            self._first = blocks
        self.difference = max(self.difference, float(np.abs(blocks - self._first).max()))
        if self._seen % self._every == 0:
            self._kept.append(frame.copy())
        if len(self._kept) == KEPT_FRAMES:  # a long video must not fill the memory
            del self._kept[1::2]
            self._every *= 2
        self._seen += 1

    @property
    def middle(self) -> NDArray[np.uint8]:
        """A frame from about the middle."""
        return self._kept[min(self._seen // 2 // self._every, len(self._kept) - 1)]


def _thumbnail(frame: NDArray[np.uint8], width: int, height: int, side: int) -> bytes:
    """A JPEG of a square frame in the shape of the video."""
    scale = side / max(width, height)
    shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    return thumbnail_of(Image.fromarray(frame).resize(shape, Image.Resampling.BOX), side)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

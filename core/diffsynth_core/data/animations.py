"""Animated images (WebP, PNG, AVIF) as clips, decoded frame by frame by Pillow, with the durations in the file.

Color profiles are converted to sRGB and transparent parts to white, as in still images. Frames are resampled in time
as ffmpeg's filter `fps` does, so that a clip is the same in any format. GIF is decoded by ffmpeg.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from diffsynth_core.data.clips import VideoHeader, Watched
from diffsynth_core.data.decoding import UnreadableVideo
from diffsynth_core.data.formats import ending_of, media_kind
from diffsynth_core.data.images import MAX_IMAGE_PIXELS, cover, frames_of, open_image, to_rgb
from diffsynth_core.progress import pluralize

UNTIMED_SECONDS = 0.1
"""Duration of a frame without one in the file, as in browsers."""


def is_animation(path: Path) -> bool:
    """Return whether a file is an animated image that Pillow decodes; False if it cannot be opened."""
    if ending_of(path.name) == ".gif" or media_kind(path) != "image":
        return False
    try:
        with open_image(path) as image:
            return image.format != "GIF" and frames_of(image) > 1
    except Exception:  # the reason is reported when it is read as an image
        return False


def read_header(path: Path) -> VideoHeader:
    """Return size and mean frame rate; decodes all frames, because only they contain durations.

    Raises:
        UnreadableVideo: if a frame cannot be decoded.
    """
    width = height = 0
    seconds = []
    for frame, shown in _frames(path):
        width, height = frame.size
        seconds.append(shown)
    return VideoHeader(width, height, False, round(len(seconds) / sum(seconds), 2))


def count_frames(path: Path, frame_rate: float | None, limit: int | None) -> int:
    """See `videos.count_frames`."""
    frames = len(_sources([shown for _, shown in _frames(path)], frame_rate))
    return frames if limit is None else min(frames, limit)


def watch(path: Path, frame_rate: float | None, side: int, take: Callable[[NDArray[np.uint8]], None]) -> Watched:
    """See `videos.watch_video`."""
    seconds = []
    for frame, shown in _frames(path):
        seconds.append(shown)
        take(np.asarray(frame.resize((side, side), Image.Resampling.BOX)))
    resampled = None if frame_rate is None else len(_sources(seconds, frame_rate))
    return Watched(len(seconds), resampled, tuple(_starts(seconds)))


def load(path: Path, start: int, frames: int, height: int, width: int, frame_rate: float | None) -> NDArray[np.uint8]:
    """See `videos.load_clip`: returns `[frames, height, width, 3]`, RGB, 0..255.

    Raises:
        UnreadableVideo: if the file ends before the last frame, or a frame cannot be decoded.
    """
    seconds = [shown for _, shown in _frames(path, pixels=False)]
    sources = _sources(seconds, frame_rate)[start : start + frames]
    if len(sources) < frames:
        raise UnreadableVideo(path, f"ends early: {len(sources)} of {pluralize(frames, 'frame')}")
    wanted = set(sources)
    covered = {place: cover(frame, height, width) for place, (frame, _) in enumerate(_frames(path)) if place in wanted}
    return np.stack([covered[source] for source in sources])


def _frames(path: Path, pixels: bool = True) -> Iterator[tuple[Image.Image, float]]:
    """Yield the frames, upright RGB unless `pixels` are not needed, and their durations in seconds."""
    with _clear_errors(path), open_image(path) as image:
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise ValueError(f"more than {MAX_IMAGE_PIXELS} pixels")
        for place in range(frames_of(image)):
            image.seek(place)
            image.load()
            shown = float(image.info.get("duration") or 0) / 1000
            yield (to_rgb(ImageOps.exif_transpose(image)) if pixels else image), shown or UNTIMED_SECONDS


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """Convert exceptions of Pillow into one clear error."""
    try:
        yield
    except UnreadableVideo:
        raise
    except Exception as error:
        raise UnreadableVideo(path, str(error).replace(f" '{path}'", "")) from error


def _starts(seconds: list[float]) -> list[float]:
    """Return the start of each frame in seconds, relative to the first."""
    return list(accumulate(seconds[:-1], initial=0.0))


def _sources(seconds: list[float], frame_rate: float | None) -> list[int]:
    """Return the frame of the file for each frame of the clip."""
    if frame_rate is None:
        return list(range(len(seconds)))
    places = [math.floor(start * frame_rate + 0.5) for start in _starts(seconds)]
    count = max(1, math.floor(sum(seconds) * frame_rate + 0.5))
    sources, source = [], 0
    for place in range(count):
        while source + 1 < len(places) and places[source + 1] <= place:
            source += 1
        sources.append(source)
    return sources

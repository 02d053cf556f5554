"""Videos: headers, the number of frames that can be decoded, and the pixels of clips.

The first video stream that is not a cover image is used. Rotation is applied; non-square pixels are made square by
changing the width. Colors follow the tags of the file, or BT.601 in limited range without tags; high dynamic range is
not tone-mapped. Transparent parts of a GIF become white; other alpha channels are ignored, which shows the colors
stored under them. Animated images other than GIF are decoded by Pillow (animations.py).
"""

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffsynth_core.data import animations
from diffsynth_core.data.clips import VideoHeader, Watched
from diffsynth_core.data.decoding import FRAMES_AS_THEY_ARE, Decoding, UnreadableVideo
from diffsynth_core.progress import pluralize

VIDEO_TRANSFORM = 1
"""Incremented when the same file gives other pixels at the same size, or another header, so that older encodings and
cached headers are not reused.
"""
SCALER = "lanczos+accurate_rnd+full_chroma_int+full_chroma_inp"
"""Without the flags after the first, a video that keeps its size comes out darker by 1 to 2 of 255."""
PLANES = (1, 2, 0)
"""Position in RGB of ffmpeg's planes green, blue and red; writing planes takes 60 % of the time of packed pixels."""

ONE_PIXEL = ("crop=1:1:0:0:exact=1", "format=gray")
"""Filters for frames that are only counted."""


def read_video_header(path: Path) -> VideoHeader:
    """Return size, rotation and frame rate of a video; decodes its first frame.

    Raises:
        DiffSynthError: if the file is not a video, or its first frame cannot be decoded.
    """
    if animations.is_animation(path):
        return animations.read_header(path)
    with Decoding(path, ["-frames:v", "1", "-f", "framecrc"]) as decoding:
        table = decoding.read_all().decode("ascii", "replace")
        decoding.check(0, sum(not line.startswith("#") for line in table.splitlines()), 1, None)
        stream = decoding.description()
    size = re.search(r"^#dimensions 0: (\d+)x(\d+)$", table, re.MULTILINE)
    if size is None:
        raise UnreadableVideo(path, "no frame size")
    aspect = re.search(r"^#sar 0: ([1-9]\d*)/([1-9]\d*)$", table, re.MULTILINE)
    width = round(int(size[1]) * (int(aspect[1]) / int(aspect[2]) if aspect else 1.0))
    angle = re.search(r"Display ?Matrix: rotation of (-?[\d.]+)", stream, re.IGNORECASE)
    return VideoHeader(width, int(size[2]), angle is not None and float(angle[1]) != 0, _frame_rate(stream, table))


def count_frames(path: Path, frame_rate: float | None, limit: int | None) -> int:
    """Return the number of frames by decoding the video; with a `limit`, decoding stops there.

    Without a `frame_rate` these are the frames of the file, whatever their timestamps; with one, those after
    resampling.

    Raises:
        DiffSynthError: if the file is not a video, has no frames, or is truncated or damaged before the limit.
    """
    if animations.is_animation(path):
        return animations.count_frames(path, frame_rate, limit)
    filters = ["-vf", ",".join([*_timing(frame_rate, 0, limit), *ONE_PIXEL])]
    with Decoding(path, [*filters, "-f", "rawvideo"]) as decoding:
        frames = len(decoding.read_all())
        decoding.check(0, frames, limit, frame_rate)
    return frames


def watch_video(path: Path, frame_rate: float | None, side: int, take: Callable[[NDArray[np.uint8]], None]) -> Watched:
    """Decode a video once, to its end, and pass each frame to `take`: `[side, side, 3]`, RGB, 0..255.

    The frames are upright and resized to a square, ignoring the aspect ratio. `take` receives the same buffer each
    time. With a `frame_rate`, the frames at that rate are counted too.

    Raises:
        DiffSynthError: if the file is not a video, has no frames, or is truncated or damaged.
    """
    if animations.is_animation(path):
        return animations.watch(path, frame_rate, side, take)
    output = ["-vf", f"scale={side}:{side}:flags=area,format=rgb24", "-f", "rawvideo"]
    if frame_rate is not None:
        counted = ",".join([*_timing(frame_rate, 0, None), *ONE_PIXEL])
        output += ["-", *FRAMES_AS_THEY_ARE, "-vf", counted, "-f", "null"]
    frame = np.empty((side, side, 3), np.uint8)
    frames = 0
    with Decoding(path, output) as decoding:
        while decoding.read_into(frame):
            frames += 1
            take(frame)
        decoding.check(0, frames, None, frame_rate)
        resampled = None if frame_rate is None else decoding.frames_beside(frames)
        return Watched(frames, resampled, decoding.frame_times())


def load_clip(
    path: Path, start: int, frames: int, height: int, width: int, frame_rate: float | None
) -> NDArray[np.uint8]:
    """Return frames `start` … `start + frames - 1` of a video at a training size, `[frames, height, width, 3]`, RGB,
    0..255.

    Frames are numbered as `count_frames` counts them with the same `frame_rate`. They are upright, scaled (Lanczos)
    until they cover the size, then center-cropped, as in `load_image`. In memory the colors are planes: the array is a
    view of `[frames, 3, height, width]`.

    Raises:
        DiffSynthError: if the file is not a video, ends before the last frame, or is damaged before it.
    """
    if animations.is_animation(path):
        return animations.load(path, start, frames, height, width, frame_rate)
    filters = [*_timing(frame_rate, start, start + frames), *_covering(height, width), "format=gbrp"]
    planes = np.empty((frames, 3, height, width), np.uint8)
    with Decoding(path, ["-vf", ",".join(filters), "-f", "rawvideo"]) as decoding:
        arrived = 0
        while arrived < frames and all(decoding.read_into(planes[arrived, color]) for color in PLANES):
            arrived += 1
        decoding.check(start, arrived, frames, frame_rate)
    if arrived < frames:
        position = f" from frame {start}" if start else ""
        raise UnreadableVideo(path, f"ends early: {arrived} of {pluralize(frames, 'frame')}{position}")
    return planes.transpose(0, 2, 3, 1)


def _frame_rate(stream: str, table: str) -> float:
    """Return frames per second: the mean of the file, or ffmpeg's time base."""
    mean = re.search(r" ([\d.]+)(k?) fps", stream)
    if mean:
        return float(mean[1]) * (1000 if mean[2] else 1)
    base = re.search(r"^#tb 0: ([1-9]\d*)/(\d+)$", table, re.MULTILINE)
    return round(float(Fraction(int(base[2]), int(base[1]))), 2) if base else 0.0


def _timing(frame_rate: float | None, start: int, end: int | None) -> list[str]:
    """Return filters that resample in time and keep the frames `start` … `end - 1`.

    Resampled frame n is the last one displayed before (n + 0.5) / rate seconds after the first.
    """
    resampling = [] if frame_rate is None else [f"fps={Fraction(frame_rate).limit_denominator(1001)}"]
    return [*resampling, f"trim=start_frame={start}" + ("" if end is None else f":end_frame={end}")]


def _covering(height: int, width: int) -> list[str]:
    """Return filters that scale until the size is covered, with Python's rounding (half to even), and center-crop."""
    upright, scale = "round(iw*sar)", f"max({width}/ld(0),{height}/ih)"
    sides = [
        f"'st(0,{upright});st(1,{side}*{scale});"
        f"max({least},if(eq(ld(1)-floor(ld(1)),0.5),2*round(ld(1)/2),round(ld(1))))'"
        for side, least in (("ld(0)", width), ("ih", height))
    ]
    cut = f"crop={width}:{height}:floor((iw-{width})/2):floor((ih-{height})/2):exact=1"
    return [f"scale=w={sides[0]}:h={sides[1]}:flags={SCALER}", cut]

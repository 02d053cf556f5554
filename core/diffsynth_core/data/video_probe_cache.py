"""Cached properties of videos that require decoding: headers and frame counts."""

import threading
from collections import defaultdict
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

from diffsynth_core.data.clips import VideoHeader
from diffsynth_core.data.videos import VIDEO_TRANSFORM, count_frames, read_video_header
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.hub.file_cache import FileCache, Stamp, file_stamp


class VideoProbeCache:
    """Cache of headers and frame counts. Thread-safe: one thread decodes a file, others wait for the result."""

    def __init__(self, memory: Path) -> None:
        self._memory = FileCache(memory)
        self._changing = threading.Lock()
        self._asking: defaultdict[tuple[Path, str], threading.Lock] = defaultdict(threading.Lock)

    def exclusive(self) -> AbstractContextManager[None]:
        """See `FileCache.exclusive`."""
        return self._memory.exclusive()

    def header(self, path: Path) -> VideoHeader:
        """Return the header of a video; decodes its first frame unless the header is cached.

        Raises:
            DiffSynthError: see `read_video_header`.
        """
        question = f"video header {VIDEO_TRANSFORM}"
        with self._asked_once(path, question):
            stamp = _stamp(path)
            known = self._memory.get(path, question, VideoHeader, stamp)
            if known is not None:
                return known
            header = read_video_header(path)
            self._memory.put(path, question, stamp, asdict(header))
            return header

    def count(self, path: Path, frame_rate: float | None, limit: int | None) -> int:
        """Return the number of frames of a video, or `limit` if it has more; decodes only what is not cached.

        Raises:
            DiffSynthError: see `count_frames`.
        """
        rate = "their own rate" if frame_rate is None else float(frame_rate)
        question = f"video frames {VIDEO_TRANSFORM} at {rate}"
        with self._asked_once(path, question):
            stamp = _stamp(path)
            frames, ended = self._memory.get(path, question, tuple[int, bool], stamp) or (0, False)
            if limit is not None and frames >= limit:
                return limit
            if not ended:
                frames = count_frames(path, frame_rate, limit)
                self._memory.put(path, question, stamp, [frames, limit is None or frames < limit])
            return frames

    def _asked_once(self, path: Path, question: str) -> threading.Lock:
        with self._changing:
            return self._asking[path, question]


def _stamp(path: Path) -> Stamp:
    try:
        return file_stamp(path)
    except OSError as error:
        raise DiffSynthError(f"`{path}` cannot be read as a video: {error.strerror}") from error

"""How many frames videos have, counted by decoding once and remembered."""

import json
import threading
from collections import defaultdict
from pathlib import Path

from diffsynth_core.data.videos import VIDEO_TRANSFORM, count_frames
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.sources.identity import absolute, append, file_stamp

Key = tuple[str, float | None]
"""(absolute path, frame rate asked for)"""


class FrameCounts:
    """Counts of frames, remembered by path, size and times of the file, and by frame rate, in one append-only file.

    Each line is written by one call, so that several processes can share the file; a line that a crash cut short is
    passed over. Threads may ask at the same time: a file is decoded by one of them while the others wait for it.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: dict[Key, tuple[list[int], int, bool]] = {}
        """(stamp of the file, frames counted, whether the end was reached)"""
        self._changing = threading.Lock()
        self._counting: defaultdict[Key, threading.Lock] = defaultdict(threading.Lock)
        self._start = ""
        if memory.exists():
            text = memory.read_text(encoding="utf-8", errors="replace")
            self._start = "\n" if text and not text.endswith("\n") else ""
            for line in text.splitlines():
                self._learn(line)

    def count(self, path: Path, frame_rate: float | None, limit: int | None) -> int:
        """Number of frames of a video, or `limit` when it has more; decodes only what is not remembered.

        Raises:
            DiffSynthError: when the file is no video, has no frames, or is cut off or damaged before the limit.
        """
        key = (absolute(path), None if frame_rate is None else float(frame_rate))
        with self._changing:
            counting = self._counting[key]
        with counting:
            try:
                stamp = file_stamp(path)
            except OSError as error:
                raise DiffSynthError(f"`{path}` cannot be read as a video: {error.strerror}") from error
            known = self._answer(key, stamp, limit)
            if known is not None:
                return known
            frames = count_frames(path, frame_rate, limit)
            self._remember(key, stamp, frames, limit is None or frames < limit)
            return frames

    def _answer(self, key: Key, stamp: list[int], limit: int | None) -> int | None:
        known_stamp, frames, ended = self._known.get(key, ([], 0, False))
        if known_stamp != stamp:
            return None
        if limit is not None and frames >= limit:
            return limit
        return frames if ended else None

    def _learn(self, line: str) -> None:
        """Take in a remembered line; one that is damaged or of an older way of decoding is passed over."""
        try:
            entry = json.loads(line)
            if entry["transform"] == VIDEO_TRANSFORM:
                value = (list(entry["stamp"]), int(entry["frames"]), bool(entry["ended"]))
                self._known[(entry["path"], entry["frame_rate"])] = value
        except (ValueError, KeyError, TypeError):
            return

    def _remember(self, key: Key, stamp: list[int], frames: int, ended: bool) -> None:
        entry = {"path": key[0], "frame_rate": key[1], "stamp": stamp, "frames": frames, "ended": ended}
        with self._changing:
            self._known[key] = (stamp, frames, ended)
            append(self._memory, self._start + json.dumps({"transform": VIDEO_TRANSFORM, **entry}) + "\n")
            self._start = ""

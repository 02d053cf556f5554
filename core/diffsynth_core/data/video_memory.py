"""What videos hold, found out by decoding once and remembered: their headers, and how many frames they have."""

import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffsynth_core.data.videos import VIDEO_TRANSFORM, VideoHeader, count_frames, read_video_header
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.files import locked
from diffsynth_core.sources.identity import absolute, append, file_stamp

Key = tuple[str, str]
"""(absolute path, what was asked: `header`, or `frames` with the frame rate)"""


class VideoMemory:
    """Headers and counts of frames, remembered by path, size and times of the file, in one append-only file.

    Each line is written by one call, so that several processes can share the file; a line that a crash cut short is
    passed over. Threads may ask at the same time: a file is decoded by one of them while the others wait for it.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: dict[Key, tuple[list[int], dict[str, Any]]] = {}
        """(stamp of the file, the answer)"""
        self._changing = threading.Lock()
        self._asking: defaultdict[Key, threading.Lock] = defaultdict(threading.Lock)
        self._start = ""
        self._read()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within it no other process asks: of those that begin together one decodes, the others find its answers."""
        with locked(self._memory.with_suffix(".lock")):
            self._read()
            yield

    def _read(self) -> None:
        if self._memory.exists():
            text = self._memory.read_text(encoding="utf-8", errors="replace")
            self._start = "\n" if text and not text.endswith("\n") else ""
            for line in text.splitlines():
                self._learn(line)

    def header(self, path: Path) -> VideoHeader:
        """The header of a video; decodes its first frame unless it is remembered.

        Raises:
            DiffSynthError: as `read_video_header`.
        """
        key = (absolute(path), "header")
        with self._lock(key):
            stamp = _stamp(path)
            answer = self._answer(key, stamp)
            if answer is not None:
                return VideoHeader(**answer)
            header = read_video_header(path)
            self._remember(key, stamp, asdict(header))
            return header

    def count(self, path: Path, frame_rate: float | None, limit: int | None) -> int:
        """Number of frames of a video, or `limit` when it has more; decodes only what is not remembered.

        Raises:
            DiffSynthError: as `count_frames`.
        """
        key = (absolute(path), f"frames at {'their own rate' if frame_rate is None else float(frame_rate)}")
        with self._lock(key):
            stamp = _stamp(path)
            answer = self._answer(key, stamp) or {"frames": 0, "ended": False}
            if limit is not None and answer["frames"] >= limit:
                return limit
            if answer["ended"]:
                return int(answer["frames"])
            frames = count_frames(path, frame_rate, limit)
            self._remember(key, stamp, {"frames": frames, "ended": limit is None or frames < limit})
            return frames

    def _lock(self, key: Key) -> threading.Lock:
        with self._changing:
            return self._asking[key]

    def _answer(self, key: Key, stamp: list[int]) -> dict[str, Any] | None:
        known_stamp, answer = self._known.get(key, ([], None))
        return answer if known_stamp == stamp else None

    def _learn(self, line: str) -> None:
        """Take in a remembered line; one that is damaged or of an older way of decoding is passed over."""
        try:
            entry = json.loads(line)
            if entry["transform"] == VIDEO_TRANSFORM:
                answer = entry["answer"]
                VideoHeader(**answer) if entry["asked"] == "header" else (int(answer["frames"]), bool(answer["ended"]))
                self._known[(entry["path"], entry["asked"])] = (list(entry["stamp"]), answer)
        except (ValueError, KeyError, TypeError):
            return

    def _remember(self, key: Key, stamp: list[int], answer: dict[str, Any]) -> None:
        entry = {"transform": VIDEO_TRANSFORM, "path": key[0], "asked": key[1], "stamp": stamp, "answer": answer}
        with self._changing:
            self._known[key] = (stamp, answer)
            append(self._memory, self._start + json.dumps(entry) + "\n")
            self._start = ""


def _stamp(path: Path) -> list[int]:
    try:
        return file_stamp(path)
    except OSError as error:
        raise DiffSynthError(f"`{path}` cannot be read as a video: {error.strerror}") from error

"""One ffmpeg process that decodes a video into a pipe, and what its log reveals about damage.

ffmpeg conceals damage and exits successfully. Its log shows the order in which packets were read and frames decoded,
so that signs of damage can be located before or after the frames in use, for any number of threads.
"""

import math
import os
import re
import subprocess
import threading
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe
from numpy.typing import NDArray

from diffsynth_core.data.formats import demuxers_of, raw_stream_of
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.progress import pluralize

FRAMES_AS_THEY_ARE = ("-map", "0:V:0", "-fps_mode", "passthrough")
"""Output options: the first video stream that is not a cover image, with no frame duplicated or dropped."""
FRAME_DAMAGE = (
    b"concealing ",
    b"corrupt decoded frame",
    b"Error submitting packet to decoder",
    b"Decoding error:",
    b"LZW decode failed",
    b"slice CRC mismatch",
)
"""Messages of decoders about a lost or concealed frame, logged before that frame and those that depend on it."""
PACKET_DAMAGE = b"[in#0/", b"] [error] "
"""Parts of messages about bytes skipped between packets; while a file is opened they have the prefix `[in#0 @`."""
CUT_OFF = (b"File ended prematurely", b"partial file", b"corrupt input packet")
"""Messages about a file that ends within a packet."""
DECODED, READ = b"decoder -> pts:", b"demuxer -> ist_index:"
"""What `-debug_ts` says once for each frame, and for each packet."""
ENCODED = b"encoder -> "
"""Message of `-debug_ts` for each frame of each output."""
CHATTER = (b"demuxer+", b"filter_raw -> ", b"filter -> ", b"encoder <- ", b"muxer <- ")
"""Parts of log lines that are ignored."""
REORDERING = 16
"""Maximum number of frames read before one that is displayed earlier (H.264, max_num_reorder_frames)."""
KEPT_LINES = 500
"""Maximum number of log lines kept."""
DISCARDED_BYTES = 1 << 20
"""Bytes of pixels read at a time when they are discarded."""
REASONS = (
    ("matches no streams", "no video stream", False),
    ("Format not on whitelist", "not a known video format", False),
    ("misdetection possible", "not a known video format", False),
    ("moov atom not found", "truncated before the index at its end (moov atom)", True),
    ("Error opening input: Invalid data", "not a known video format, or a damaged header", False),
    ("Error opening input: End of file", "truncated before the first frame", True),
)
"""(message of ffmpeg about a file it cannot open, meaning, whether the file is truncated); the first match counts."""
NOT_OPENED = "Error opening "
"""Prefix of ffmpeg's message about a file that it cannot open."""


class UnreadableVideo(DiffSynthError):
    """A video cannot be used: the `reason` in words, and whether it is truncated (`cut_off`)."""

    def __init__(self, path: Path, reason: str, cut_off: bool = False) -> None:
        if path.is_file() and path.stat().st_size == 0:
            reason, cut_off = "the file is empty", False
        super().__init__(f"`{path}` cannot be read as a video: {reason}", "replace the file or remove its row")
        self.reason = reason
        self.cut_off = cut_off


class Decoding:
    """An ffmpeg process that decodes the first video stream of `path` into a pipe; it has ended after the block.

    Args:
        output: ffmpeg options after the input: filters and format, and those of further outputs.
        threads: number of threads of the decoder.

    Raises:
        DiffSynthError: if ffmpeg cannot be started.
    """

    def __init__(self, path: Path, output: Sequence[str], threads: int | None = None) -> None:
        self._path = path
        self._output = output
        self._threads = threads
        self._log = _Log()
        before = ["-nostdin", "-nostats", "-hide_banner", "-loglevel", "repeat+level+info", "-debug_ts"]
        # Without -reinit_filter 0, filters restart their frame count after a change of size or colors.
        reading = ["-format_whitelist", ",".join(demuxers_of(path)), "-reinit_filter", "0"]
        raw_stream = raw_stream_of(path)
        if raw_stream:  # probing takes some for images
            reading += ["-f", raw_stream]
        if threads is not None:
            reading += ["-threads", str(threads)]
        source = ["-i", f"file:{path}", *FRAMES_AS_THEY_ARE]
        self._arguments = [*before, *reading, *source, *output, "-"]

    def __enter__(self) -> Self:
        try:
            self._process = subprocess.Popen(
                [get_ffmpeg_exe(), *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "AV_LOG_FORCE_NOCOLOR": "1"},
                process_group=0,  # Ctrl-C is handled by the caller: the current clip is read to its end
            )
        except (OSError, RuntimeError) as error:
            raise DiffSynthError(f"cannot start ffmpeg: {error}", "reinstall `imageio-ffmpeg`") from error
        self._pixels = cast(BufferedReader, self._process.stdout)
        self._messages = cast(BufferedReader, self._process.stderr)
        # A separate thread: ffmpeg blocks while its log is not read.
        self._listener = threading.Thread(target=self._log.read, args=(self._messages,), daemon=True)
        self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def read_into(self, target: NDArray[np.uint8]) -> bool:
        """Fill `target`, which is contiguous, from the pipe; return False if the stream ended first."""
        if self._pixels.readinto(target.data) == target.nbytes:
            return True
        self._process.wait()
        return False

    def read_all(self) -> bytes:
        """Return everything up to the end of the stream."""
        everything = self._pixels.read()
        self._process.wait()
        return everything

    def description(self) -> str:
        """ffmpeg's description of the stream; call `check` first."""
        text = "\n".join(self._log.lines)
        mapped = re.search(r"Stream #0:(\d+) -> #0:0", text)
        found = mapped and re.search(rf"Stream #0:{mapped[1]}\b.*?(?=Stream #|Stream mapping:)", text, re.DOTALL)
        return found[0] if found else ""

    def frame_times(self) -> tuple[float, ...]:
        """Timestamps of the frames in seconds, in decoding order; call `check` first."""
        return tuple(self._log.frame_times)

    def frames_beside(self, arrived: int) -> int:
        """Return the number of frames of a second output when `arrived` came through the pipe; call `check` first."""
        return self._log.encoded - arrived

    def check(self, start: int, arrived: int, asked: int | None, frame_rate: float | None) -> None:
        """End the process and check the result: `arrived` frames from `start` on, of `asked` or, if None, of all.

        Raises:
            DiffSynthError: if the file cannot be opened or has no frames, or is truncated or damaged before the last
                requested frame.
        """
        self._stop()
        refusal = self._log.refusal()
        if refusal:
            raise UnreadableVideo(self._path, *refusal)
        complete = asked is not None and arrived >= asked
        needed = self._log.frames_needed(start + arrived if complete else None, frame_rate)
        if self._log.cut_off and needed > self._log.whole_frames():
            raise UnreadableVideo(
                self._path, f"truncated after {pluralize(self._log.whole_frames(), 'frame')}", cut_off=True
            )
        damaged = self._log.first_damage(needed)
        if damaged is not None and self._threads == 1:
            raise UnreadableVideo(self._path, f"damaged at frame {damaged}", self._log.cut_off)
        if damaged is not None:
            self._check_in_order(start, arrived, asked, frame_rate)
        if not self._log.frame_times:
            raise UnreadableVideo(self._path, "no frames")

    def _check_in_order(self, start: int, arrived: int, asked: int | None, frame_rate: float | None) -> None:
        """Check again with one thread: several threads report damage frames ahead of the output."""
        with Decoding(self._path, self._output, threads=1) as again:
            while again._pixels.read(DISCARDED_BYTES):
                pass
            again.check(start, arrived, asked, frame_rate)

    def _stop(self) -> None:
        """End ffmpeg; its log is complete up to the last received frame, whose lines were written before it."""
        self._process.kill()
        self._process.wait()
        self._listener.join()
        self._pixels.close()
        self._messages.close()


class _Log:
    """Reads ffmpeg's log with `-debug_ts` line by line while it works."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.frame_times: list[float] = []
        """Seconds at which the decoded frames are shown, in the order of decoding."""
        self.cut_off = False
        self.encoded = 0
        """Frames of all outputs together: a line that starts within another does not show its output."""
        self._packet_times: list[float] = []
        self._damaged_frame: int | None = None
        self._damaged_packet: int | None = None

    def read(self, stream: BufferedReader) -> None:
        # ffmpeg writes lines in pieces, between which other threads write: a line may start anywhere.
        for line in stream:
            if DECODED in line:
                self.frame_times.append(_seconds(line.partition(DECODED)[2]))
            elif READ in line:
                self._packet_times.append(_seconds(line.partition(READ)[2]))
            elif ENCODED in line:
                self.encoded += 1
            elif not any(word in line for word in CHATTER):
                self._take(line)

    def _take(self, line: bytes) -> None:
        if self._damaged_frame is None and any(sign in line for sign in FRAME_DAMAGE):
            self._damaged_frame = len(self.frame_times)
        if any(sign in line for sign in CUT_OFF):
            self.cut_off = True
        elif self._damaged_packet is None and all(sign in line for sign in PACKET_DAMAGE):
            self._damaged_packet = len(self._packet_times)
        if len(self.lines) < KEPT_LINES:
            self.lines.append(line.decode("utf-8", "replace").rstrip())

    def refusal(self) -> tuple[str, bool] | None:
        """Return why ffmpeg could not open the file, and whether it is truncated; None if it could."""
        text = "\n".join(self.lines)
        if NOT_OPENED not in text:
            return None
        for said, meant, cut_off in REASONS:
            if said in text:
                return meant, cut_off
        other = re.search(rf"{NOT_OPENED}input: (.*)", text)
        return (other[1], False) if other else None

    def frames_needed(self, end: int | None, frame_rate: float | None) -> float:
        """Return the number of frames of the file for `end` resampled frames, with the rounding of the filter `fps`."""
        if end is None or frame_rate is None:
            return math.inf if end is None else end
        places = [math.floor(time * frame_rate + 0.5) for time in self.frame_times]
        return next((number for number, place in enumerate(places) if place - places[0] >= end), math.inf)

    def whole_frames(self) -> int:
        """Return the number of frames that a truncated file still has without gaps."""
        times = self._packet_times
        ahead = (sum(time > times[i] for time in times[max(0, i - REORDERING) : i]) for i in range(len(times)))
        return max(0, min(len(times) - max(ahead, default=0), len(self.frame_times)))

    def first_damage(self, needed: float) -> int | None:
        """Return the first damaged frame that affects the first `needed` frames; None if they are intact."""
        signs = []
        if self._damaged_frame is not None and self._damaged_frame < needed:
            signs.append(self._damaged_frame)
        if self._damaged_packet is not None and self._damaged_packet < needed + REORDERING:
            signs.append(self._damaged_packet)
        return min(signs, default=None)


def _seconds(line: bytes) -> float:
    """Return the time in a line of the decoder; 0 if unknown, which counts the frame as used."""
    found = re.search(rb"pts_time:(-?[\d.e+-]+)", line)
    return float(found[1]) if found else 0.0

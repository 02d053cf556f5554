"""Video files looked into by decoding them. No torch.

Facts only, from as few decodings as can be; what is wrong with them is said by video_checks.py. The reading is that of
training (data/videos.py, data/decoding.py): which frames count, what is damage, where a file is cut off.
"""

from dataclasses import replace
from pathlib import Path

from diffsynth_core.data.videos import count_frames, read_video_header
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.validation.facts import Fault, VideoFacts


def examine_video(base: Path, name: str, frame_rate: float | None, thumbnails: int | None) -> VideoFacts:
    """Decode the video `name` below `base` to its end; whatever goes wrong becomes its `fault`.

    `frame_rate`: that of training, in frames per second; None: the file's own. `thumbnails`: the longer side in pixels
    of a picture of the first frame; None: none is made.
    """
    path = base / name
    try:
        known = VideoFacts(name, path.stat().st_size)
    except OSError as error:
        return VideoFacts(name, 0, fault=Fault("VIDEO_UNREADABLE", str(error.strerror)))
    try:
        header = read_video_header(path)
        frames = count_frames(path, None, None)
    except DiffSynthError as error:
        reason = str(error).partition("cannot be read as a video: ")[2]
        return replace(known, fault=Fault("VIDEO_UNREADABLE", reason))
    return replace(
        known,
        width=header.width,
        height=header.height,
        frames=frames,
        frame_rate=header.frame_rate,
        rotated=header.rotated,
    )

"""Facts about a clip that are known before its pixels are used: plain records. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class VideoHeader:
    """The header of a video; width and height are those of the upright video in square pixels.

    Attributes:
        frame_rate: mean number of frames per second, rounded to two decimals, as far as the header is plausible.
    """

    width: int
    height: int
    rotated: bool
    frame_rate: float


@dataclass(frozen=True)
class Watched:
    """Results of decoding a video to its end.

    Attributes:
        frames: frames of the file.
        resampled: frames at the requested frame rate; None if none was requested.
        times: timestamps of the frames in seconds, in decoding order.
    """

    frames: int
    resampled: int | None
    times: tuple[float, ...]

"""What is known of a clip before its pixels are used: plain records. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class VideoHeader:
    """What the header of a video says; width and height are those of the upright video, in square pixels.

    `frame_rate` is the mean number of frames per second with two decimals, as far as the header can be believed.
    """

    width: int
    height: int
    rotated: bool
    frame_rate: float


@dataclass(frozen=True)
class Watched:
    """What decoding a video to its end tells.

    `frames`: those of the file. `resampled`: those at the frame rate asked for; None: none was. `times`: seconds at
    which the frames are shown, in the order of decoding.
    """

    frames: int
    resampled: int | None
    times: tuple[float, ...]

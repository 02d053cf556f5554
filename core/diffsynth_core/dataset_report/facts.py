"""Facts from decoding a file once: plain records, created in worker processes and sent back. No torch.

`ImageFacts` are created by images.py, `VideoFacts` by videos.py; both are facts only. Findings are derived from them
by the pure functions in image_checks.py, pair_checks.py, video_checks.py and set_checks.py.
"""

from dataclasses import dataclass, field

from diffsynth_core.data.color import Colors

FLAT_SPREAD = 4
"""Maximum range of the values of a channel, 0..255, in an empty image: JPEG noise has as much."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a file has no further facts: a code of findings.CODES, and the reason in words."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """An image. Sizes in pixels are those of the upright image; with a `fault`, only what is known is set.

    Attributes:
        format, mode: Pillow's names of the file format and the pixel mode.
        orientation: EXIF orientation, 1 to 8.
        frames: of an animation.
        pages: of a document.
        color_profile: what is converted to sRGB, or is not, and why.
        transparent: a pixel is not opaque.
        spread: maximum range of the values of a channel, 0..255; above `FLAT_SPREAD` possibly that of the scaled-down
            image.
        difference_hash: 64 bits: whether the left one of two neighbors in an image of 9 x 8 is darker.
        colors: mean red, green and blue of each cell of an 8 x 8 grid, 0..255.
        sketch: digest of the scaled-down image: equal for equal pixels, and hardly for others.
        digest: sha256 of the file.
        thumbnail: a JPEG, if requested.
    """

    path: str
    file_bytes: int
    width: int = 0
    height: int = 0
    format: str = ""
    mode: str = ""
    orientation: int = 1
    frames: int = 1
    pages: int = 1
    color_profile: Colors = field(default_factory=Colors)
    transparent: bool = False
    spread: int = 255
    difference_hash: int = 0
    colors: bytes = b""
    sketch: bytes = b""
    digest: str = ""
    thumbnail: bytes | None = None
    fault: Fault | None = None


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """A video. Sizes in pixels are those of the upright video; with a `fault`, only what is known is set.

    Attributes:
        frames: frames of the file.
        resampled: frames after resampling to the training frame rate; None if it is not resampled.
        frame_rate: mean frames per second.
        spacing: shortest and longest time between frames, in seconds.
        variable_rate: they differ by more than rounding.
        still: no frame differs visibly from the first.
        digest: sha256 of the file.
        thumbnail: a JPEG of a frame in the middle, if requested.
    """

    path: str
    file_bytes: int
    width: int = 0
    height: int = 0
    frames: int = 0
    resampled: int | None = None
    frame_rate: float = 0.0
    variable_rate: bool = False
    spacing: tuple[float, float] = (0.0, 0.0)
    rotated: bool = False
    still: bool = False
    digest: str = ""
    thumbnail: bytes | None = None
    fault: Fault | None = None

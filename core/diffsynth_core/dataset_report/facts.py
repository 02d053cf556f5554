"""What decoding a file once tells of it: plain records, made in worker processes and sent back. No torch.

`ImageFacts` are made by images.py, `VideoFacts` by videos.py; both hold facts only. What is wrong with them is
for the pure functions in image_checks.py, pair_checks.py, video_checks.py and set_checks.py to say.
"""

from dataclasses import dataclass, field

from diffsynth_core.data.colour import Colours

FLAT_SPREAD = 4
"""Values of a channel, 0..255, that lie no further apart show nothing: the noise of a JPEG does as much."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Why nothing more is known of a file: a code of findings.CODES, and the reason in words."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """An image. Sizes in pixels are those of the upright image; with a `fault` only what is known stands here.

    `format` and `mode`: Pillow's names of the file's format and of its pixels. `orientation`: of the EXIF data, 1 to 8.
    `frames` of an animation, `pages` of a document. `colour_profile`: what is converted to sRGB, or is not, and why.
    `transparent`: a pixel is not opaque. `spread`: how far the values of a channel, 0..255, lie apart at most; above
    `FLAT_SPREAD` that of the image scaled down will do.
    `difference_hash`: 64 bits, each telling whether of two neighbours in an image of 9 x 8 the left one is darker.
    `colours`: mean red, green and blue of each field of a grid of 8 x 8, 0..255.
    `sketch`: digest of the image scaled down; images with the same pixels have the same sketch, and hardly others.
    `digest`: sha256 of the file. `thumbnail`: a JPEG, where it was asked for.
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
    colour_profile: Colours = field(default_factory=Colours)
    transparent: bool = False
    spread: int = 255
    difference_hash: int = 0
    colours: bytes = b""
    sketch: bytes = b""
    digest: str = ""
    thumbnail: bytes | None = None
    fault: Fault | None = None


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """A video. Sizes in pixels are those of the upright video; with a `fault` only what is known stands here.

    `frames`: those of the file. `resampled`: those after resampling to the frame rate that is trained at; None: it is
    not resampled. `frame_rate`: mean frames per second. `spacing`: the shortest and the longest time from frame to
    frame, in seconds; `variable_rate`: they differ by more than rounding. `still`: no frame differs visibly from the
    first. `digest`: sha256 of the file. `thumbnail`: a JPEG of a frame from the middle, where it was asked for.
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

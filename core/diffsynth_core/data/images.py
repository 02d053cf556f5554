"""Images: headers, training sizes, and pixels.

numpy is imported where it is needed: the processes that check images start in half the time without it.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from diffsynth_core.data.color import Colors, colors_of, to_srgb
from diffsynth_core.data.formats import decoded_formats, kind_by_content, refused_format
from diffsynth_core.errors import DiffSynthError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IMAGE_TRANSFORM = 1
"""Incremented when the same file gives other pixels at the same size, so that older encodings are not reused."""
MASK_TRANSFORM = 1
"""The same for masks."""
EXIF_ORIENTATION = 0x0112
"""EXIF tag of the orientation."""
MAX_IMAGE_PIXELS = 178_956_970
"""Maximum size of an image: half a gigabyte of pixels from a small file is an attack or a mistake."""
END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND", "GIF": b"\x3b"}
"""Format -> last bytes of its files; some programs append a little."""
END_BYTES = 64
"""Number of bytes at the end of a file that are searched for the end mark."""
EXTRACT_FRAME = "save one frame as an image, or remove its row"
"""Hint for videos among images."""
IS_A_VIDEO = "it is a video"
"""Reason for rejecting a video among images."""
REPLACE = "replace the file or remove its row"
"""Hint for damaged images."""
ANIMATED = ("AVIF", "FLI", "GIF", "PNG", "WEBP")
"""Formats whose frames form an animation; those of an MPO are other views of one moment."""
PAGED = ("DCX", "TIFF")
"""Formats whose frames are pages, of which the first is used."""
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


@dataclass(frozen=True)
class ImageHeader:
    """The header of an image; width and height are those of the upright image in pixels.

    Attributes:
        pages: number of pages, of which the first is used.
    """

    width: int
    height: int
    rotated: bool
    transparent: bool
    pages: int = 1
    colors: Colors = field(default_factory=Colors)


@dataclass(frozen=True)
class SizeRule:
    """How the size of an image becomes a training size, in pixels.

    Either `height` and `width` are fixed, or images above the area `max_pixels` are scaled down to it and smaller ones
    keep their size; sides are then floored to multiples of `factor`.
    """

    height: int | None
    width: int | None
    max_pixels: int
    factor: int

    def target(self, width: int, height: int) -> tuple[int, int]:
        """Return the (height, width) for an image of `width` x `height`; a side of 0 means that it is too small."""
        if self.height is not None and self.width is not None:
            return self.height, self.width
        scale = min(1.0, math.sqrt(self.max_pixels / (width * height)))
        # An image of exactly max_pixels must not lose a row to rounding.
        fitted = (int(side * scale + 1e-6) for side in (height, width))
        target_height, target_width = (side // self.factor * self.factor for side in fitted)
        return target_height, target_width


def read_image_header(path: Path) -> ImageHeader:
    """Return size, orientation and transparency of an image, decoding it only if its end looks truncated.

    Raises:
        DiffSynthError: if the file is not an image, is truncated, or is animated.
    """
    with _opening(path) as image:
        frames = frames_of(image)
        if frames > 1:
            raise DiffSynthError(f"`{path}` is animated ({frames} frames)", EXTRACT_FRAME)
        if not _ends_well(path, image.format):
            image.load()
        # Pillow would decode a complete PNG to look for EXIF data after its pixels, where hardly any file has them.
        looked_for = image.format != "PNG" or "exif" in image.info
        orientation = image.getexif().get(EXIF_ORIENTATION, 1) if looked_for else 1
        width, height = image.size
        if orientation in SIDEWAYS and image.format != "TIFF":  # Pillow returns the upright size of a TIFF
            width, height = height, width
        pages = getattr(image, "n_frames", 1) if image.format in PAGED else 1
        colors = colors_of(image)
        return ImageHeader(width, height, orientation in range(2, 9), is_transparent(image), pages, colors)


def frames_of(image: Image.Image) -> int:
    """Return the number of animation frames of an opened image; 1 if it is not animated."""
    if image.format not in ANIMATED or not getattr(image, "is_animated", False):
        return 1
    return int(getattr(image, "n_frames", 1))


def load_image(path: Path, height: int, width: int, scaled: tuple[int, int] | None = None) -> "NDArray[np.uint8]":
    """Load an image at a training size, `[height, width, 3]`, RGB, 0..255.

    EXIF orientation is applied, a color profile is converted to sRGB, transparency is composited on white. The image
    is scaled (Lanczos) until it covers the size, or to `scaled` (height, width), which may change its aspect ratio;
    then it is center-cropped.

    Raises:
        DiffSynthError: if the file cannot be decoded completely.
    """
    with _opening(path) as image:
        rgb = to_rgb(ImageOps.exif_transpose(image))
    return cover(rgb, height, width, scaled)


def load_mask(path: Path, height: int, width: int, scaled: tuple[int, int] | None = None) -> "NDArray[np.uint8]":
    """Load a mask at a training size, `[height, width, 1]`, 0..255, white selects: the luminance of what `load_image`
    reads.

    It is scaled bilinearly, which gives no values outside the range of neighboring pixels.

    Raises:
        DiffSynthError: if the file cannot be decoded completely.
    """
    with _opening(path) as image:
        gray = to_rgb(ImageOps.exif_transpose(image)).convert("L")
    return cover(gray, height, width, scaled, Image.Resampling.BILINEAR)[..., None]


def cover(
    image: Image.Image,
    height: int,
    width: int,
    scaled: tuple[int, int] | None = None,
    filter_: Image.Resampling = Image.Resampling.LANCZOS,
) -> "NDArray[np.uint8]":
    """Return the pixels of an upright image, `[height, width, 3]`, RGB, scaled and cropped as in `load_image`."""
    import numpy as np

    if scaled:
        covering = scaled[::-1]
    else:
        scale = max(width / image.width, height / image.height)
        covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if covering != image.size:
        image = image.resize(covering, filter_)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def _ends_well(path: Path, image_format: str | None) -> bool:
    """Return whether a file ends with the bytes of its format; True for formats without an end mark."""
    end = END_MARKS.get(image_format or "")
    if end is None:
        return True
    with path.open("rb") as stream:
        stream.seek(-min(END_BYTES, path.stat().st_size), os.SEEK_END)
        return end in stream.read()


def open_image(source: Path | IO[bytes]) -> Image.Image:
    """Open an image with the formats that Pillow decodes here, and our own size limit only."""
    # Pillow warns above its own limit and refuses above twice that; here is one limit with one message.
    Image.MAX_IMAGE_PIXELS = None
    return Image.open(source, formats=decoded_formats())


class _opening:  # noqa: N801 - reads as a verb at the place of use
    """Open an image; anything that Pillow raises within the block becomes one clear error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._image: Image.Image | None = None

    def __enter__(self) -> Image.Image:
        try:
            refused = refused_format(self._path)
            if refused:
                raise DiffSynthError(f"`{self._path}` has an unsupported format", refused)
            self._image = open_image(self._path)
            if self._image.width * self._image.height > MAX_IMAGE_PIXELS:
                raise ValueError(f"more than {MAX_IMAGE_PIXELS} pixels")
        except DiffSynthError:
            raise
        except Exception as error:
            raise self._unreadable(error) from error
        return self._image

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._image:
            self._image.close()
        if isinstance(error, Exception) and not isinstance(error, DiffSynthError):
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DiffSynthError:
        what = f"`{self._path}` cannot be read as an image: "
        if self._path.is_file() and self._path.stat().st_size == 0:
            return DiffSynthError(f"{what}the file is empty", REPLACE)
        if isinstance(error, UnidentifiedImageError):
            kind, way_out = kind_by_content(self._path)
            if kind == "unsupported":
                return DiffSynthError(f"`{self._path}` has an unsupported format", way_out)
            if kind == "clip":
                return DiffSynthError(f"{what}{IS_A_VIDEO}", REPLACE)
        return DiffSynthError(what + str(error).replace(f" '{self._path}'", ""), REPLACE)


def is_transparent(image: Image.Image) -> bool:
    """Return whether an image may have pixels that are not opaque."""
    return "A" in image.getbands() or "transparency" in image.info


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB in sRGB: transparency composited on white, 16 bits scaled to 8, the color profile applied."""
    profile = image.info.get("icc_profile")
    if profile and not colors_of(image).profile:
        profile = None
    if image.mode.startswith("I"):
        image = _to_eight_bits(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels of unknown range are not supported")
    if image.mode == "LAB" and profile is None:
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    if not is_transparent(image):
        return to_srgb(image, profile) if profile else image.convert("RGB")
    rgba = image.convert("RGBA")
    if profile:
        alpha = rgba.getchannel("A")
        rgba = to_srgb(image.convert("LA") if image.mode in ("L", "LA", "La") else rgba, profile).convert("RGBA")
        rgba.putalpha(alpha)
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grayscale to 8 bits; Pillow would clip it at 255.

    Raises:
        ValueError: for 32-bit values, whose range is unknown.
    """
    import numpy as np

    values = np.asarray(image)
    if image.mode == "I" and values.size and (values.min() < 0 or values.max() > 65535):
        raise ValueError("32-bit integer pixels of unknown range are not supported")
    scaled = Image.fromarray((values.astype(np.float64) * (255 / 65535)).round().clip(0, 255).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is None:
        return scaled
    return Image.merge("LA", (scaled, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))

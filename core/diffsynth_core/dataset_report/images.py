"""Examination of image files: one decoding, and all facts from it. No torch.

Images are read as in training (data/images.py): upright, composited on white. What would cost more than a fraction of
the decoding is computed on the scaled-down image.
"""

import hashlib
import io
from dataclasses import replace
from pathlib import Path
from typing import cast

from PIL import Image, ImageOps, UnidentifiedImageError

from diffsynth_core.data.color import colors_of
from diffsynth_core.data.formats import kind_by_content, refused_format
from diffsynth_core.data.images import (
    END_BYTES,
    END_MARKS,
    EXIF_ORIENTATION,
    IS_A_VIDEO,
    MAX_IMAGE_PIXELS,
    PAGED,
    SIDEWAYS,
    frames_of,
    is_transparent,
    open_image,
    to_rgb,
)
from diffsynth_core.dataset_report.facts import FLAT_SPREAD, Fault, ImageFacts

SKETCH_SIDE = 64
"""Minimum side, in pixels, of the scaled-down image."""
SAMPLED_SIDE = 222
"""How many pixels of the shorter side go into that, where it has more than twice as many: averaging all of them costs a
sixth of the decoding. The number makes the steps between them (4.61 pixels of 1,024) fall together with few patterns.
"""
HASH_SIZE = (9, 8)
"""(width, height) of the image for the difference hash."""
COLOR_GRID = (8, 8)
"""(columns, rows) of the grid of mean colors."""
THUMBNAIL_QUALITY = 80
"""JPEG quality of thumbnails."""
OPAQUE = 255
"""Alpha of opaque pixels."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> transposition that makes the image upright."""


def examine_image(base: Path, name: str, thumbnails: int | None) -> ImageFacts:
    """Decode the image `name` below `base` completely; any failure becomes its `fault`."""
    try:
        data = (base / name).read_bytes()
    except OSError as error:
        return ImageFacts(name, 0, fault=Fault("IMAGE_UNREADABLE", str(error.strerror)))
    digest = hashlib.sha256(data).hexdigest()
    if not data:
        return ImageFacts(name, 0, digest=digest, fault=Fault("IMAGE_UNREADABLE", "the file is empty"))
    refused = refused_format(base / name)
    if refused:
        return ImageFacts(name, len(data), digest=digest, fault=Fault("FORMAT_UNSUPPORTED", refused))
    image_format = ""
    try:
        with open_image(io.BytesIO(data)) as image:
            image_format = image.format or ""
            if image.width * image.height > MAX_IMAGE_PIXELS:
                reason = f"{image.width} x {image.height} are more than {MAX_IMAGE_PIXELS} pixels"
                return ImageFacts(name, len(data), digest=digest, fault=Fault("IMAGE_BOMB", reason))
            return _facts(image, ImageFacts(name, len(data), format=image_format, digest=digest), thumbnails)
    except Exception as error:
        fault = _fault(error, data, image_format, base / name)
        return ImageFacts(name, len(data), format=image_format, digest=digest, fault=fault)


def _facts(image: Image.Image, known: ImageFacts, thumbnails: int | None) -> ImageFacts:
    """Decode an opened image, and complete its facts."""
    frames, colors = frames_of(image), colors_of(image)
    pages = getattr(image, "n_frames", 1) if image.format in PAGED else 1
    orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    image.load()
    mode, transparent = image.mode, is_transparent(image) and _has_clear_pixels(image)
    left = image.getexif().get(EXIF_ORIENTATION, 1)  # Pillow turns a TIFF itself, while it is decoded
    as_it_is = mode == "RGB" and not is_transparent(image) and not colors.profile
    rgb = image if as_it_is else to_rgb(image)  # a copy costs half a decoding
    size = rgb.size[::-1] if left in SIDEWAYS else rgb.size
    small = _upright(scaled_down(rgb), left)
    spread = _spread(small)
    return replace(
        known,
        width=size[0],
        height=size[1],
        mode=mode,
        orientation=orientation if orientation in range(1, 9) else 1,
        frames=frames,
        pages=pages,
        color_profile=colors,
        transparent=transparent,
        spread=spread if spread > FLAT_SPREAD else _spread(rgb),
        difference_hash=difference_hash(small),
        colors=small.resize(COLOR_GRID, Image.Resampling.BOX).tobytes(),
        sketch=hashlib.blake2b(small.tobytes(), digest_size=16, key=repr(size).encode()).digest(),
        thumbnail=thumbnail_of(_upright(rgb, left), thumbnails) if thumbnails else None,
    )


def same_pixels(base: Path, name: str, other: str) -> bool:
    """Return whether two images below `base` are equal pixel by pixel, as upright RGB."""
    return _pixels(base / name) == _pixels(base / other)


def _pixels(path: Path) -> tuple[tuple[int, int], bytes] | None:
    """Return size and sha256 of the pixels of an upright image; None if it can no longer be decoded."""
    try:
        with open_image(path) as image:
            rgb = to_rgb(ImageOps.exif_transpose(image))
    except Exception:
        return None
    return rgb.size, hashlib.sha256(rgb.tobytes()).digest()


def scaled_down(image: Image.Image) -> Image.Image:
    """Return an image of the same aspect ratio whose shorter side has 64 to 127 pixels, or fewer if the image has.

    Each pixel is the mean of pixels spread evenly over its area; in a small image, of all of them.
    """
    shorter = min(image.size)
    if shorter > 2 * SAMPLED_SIDE:
        width, height = (round(side * SAMPLED_SIDE / shorter) for side in image.size)
        image = image.resize((width, height), Image.Resampling.NEAREST)
    return image.reduce(max(1, min(image.size) // SKETCH_SIDE))


def difference_hash(image: Image.Image) -> int:
    """Return 64 bits: whether each pixel of a grayscale image of 9 x 8 is darker than its right neighbor (dHash)."""
    values = image.convert("L").resize(HASH_SIZE, Image.Resampling.BOX).tobytes()
    bits = 0
    for row in range(HASH_SIZE[1]):
        for column in range(HASH_SIZE[0] - 1):
            place = row * HASH_SIZE[0] + column
            bits = bits << 1 | (values[place] < values[place + 1])
    return bits


def thumbnail_of(image: Image.Image, side: int) -> bytes:
    """Return a JPEG of an image, with its longer side scaled down to `side` pixels."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.BOX)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=THUMBNAIL_QUALITY)
    return stream.getvalue()


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _spread(image: Image.Image) -> int:
    """Return the maximum range of the values of a channel, 0..255."""
    return max(high - low for low, high in cast(tuple[tuple[int, int], ...], image.getextrema()))


def _has_clear_pixels(image: Image.Image) -> bool:
    low, _ = cast(tuple[int, int], image.convert("RGBA").getchannel("A").getextrema())
    return low < OPAQUE


def _fault(error: Exception, data: bytes, image_format: str, path: Path) -> Fault:
    """Return the code of a Pillow error: a file without its end is truncated."""
    end = END_MARKS.get(image_format)
    lacks_end = end is not None and end not in data[-END_BYTES:]
    reason = str(error)
    if lacks_end or len(data) < _claimed_bytes(data) or "truncated" in reason.lower():
        return Fault("IMAGE_TRUNCATED", "the file ends before its last pixel")
    if isinstance(error, UnidentifiedImageError):
        kind, way_out = kind_by_content(path)
        if kind == "unsupported":
            return Fault("FORMAT_UNSUPPORTED", way_out or "")
        if kind == "clip":
            return Fault("IMAGE_UNREADABLE", IS_A_VIDEO)
        return Fault("IMAGE_UNREADABLE", "not a known image format")
    return Fault("IMAGE_UNREADABLE", reason)


def _claimed_bytes(data: bytes) -> int:
    """Return the minimum size of a file according to its header, for files that Pillow cannot open truncated."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return 8 + int.from_bytes(data[4:8], "little")
    if data[:4] in (b"II*\0", b"MM\0*"):  # a TIFF often has the list of what it holds at its end
        return int.from_bytes(data[4:8], "little" if data[:2] == b"II" else "big") + 1
    return 0

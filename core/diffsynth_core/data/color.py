"""Colors of images: an embedded profile is converted to sRGB, as in viewers. No torch.

The conversion is that of `ImageCms.profileToProfile` (LittleCMS, perceptual intent). A profile whose colors are within
2 of 255 of sRGB counts as sRGB, and nothing is converted.
"""

import io
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageCms

COLOR_TRANSFORM = 1
"""Incremented when the conversion changes, so that older encodings are not reused."""
SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}
"""Color space of a profile -> Pillow mode of the pixels that it applies to."""
SPACE_NAMES = {"RGB ": "RGB", "GRAY": "gray", "CMYK": "CMYK", "Lab ": "LAB"}
"""Color space of a profile -> its name in messages."""
SAME_COLOR = 2
"""Maximum difference, of 255, between colors of a profile and of sRGB that count as equal."""
PROBED_LEVELS = 7
"""Levels per channel of the grid on which a profile is compared with sRGB."""
KEPT_PROFILES = 32
"""Number of cached profiles."""
SHOWN_OF_A_NAME = 40
"""Maximum number of characters of a profile's name in a message."""

EXIF_IFD, INTEROPERABILITY_IFD = 0x8769, 0xA005
"""Tags of EXIF directories."""
EXIF_COLOR_SPACE, INTEROPERABILITY_INDEX = 0xA001, 1
"""EXIF tags that mark the color space."""
ADOBE_RGB_COLOR_SPACE, ADOBE_RGB_INDEX = 2, "R03"
"""How cameras mark Adobe RGB without a profile (DCF 2.0)."""
SRGB_GAMMA = 0.45455
"""Gamma of a PNG (gAMA) with sRGB colors."""
GAMMA_SLACK = 0.01
"""Maximum difference from `SRGB_GAMMA`."""
HEAD_BYTES = 4096
"""Code points, if any, are within this many bytes at the start of a file."""
SDR_PRIMARIES, SDR_TRANSFERS = (1, 2), (1, 2, 6, 13)
"""Code points (ITU-T H.273) that are shown as sRGB is: BT.709 and unspecified; BT.709, unspecified, BT.601, sRGB."""


@dataclass(frozen=True)
class Colors:
    """The colors of an image, if they are not plain sRGB.

    Attributes:
        profile: name of the profile that is converted from; empty if none is.
        doubt: why a contradicting statement in the file is ignored; empty if there is none.
    """

    profile: str = ""
    doubt: str = ""


def colors_of(image: Image.Image) -> Colors:
    """Return the colors of an opened image, without decoding pixels."""
    data = image.info.get("icc_profile")
    if not data:
        return Colors(doubt=_unfollowed(image))
    known = _inspect(data)
    if known.doubt:
        return Colors(doubt=known.doubt)
    if not _fits(known.space, image.mode):
        space = SPACE_NAMES[known.space]
        return Colors(doubt=f"color profile `{known.name}` is for {space}, but the pixels are {image.mode}")
    return Colors(profile="" if known.is_srgb else known.name)


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert an image from `profile` to RGB, without its transparency.

    Raises:
        ImageCms.PyCMSError: if the profile cannot be used.
    """
    mode = SPACES[_inspect(profile).space]
    converted = ImageCms.applyTransform(image.convert(mode), _transform(profile, mode))
    assert converted is not None
    return converted


@dataclass(frozen=True)
class _Profile:
    """Properties of a profile; with a `doubt` it cannot be used."""

    name: str = ""
    space: str = ""
    is_srgb: bool = False
    doubt: str = ""


@lru_cache(maxsize=KEPT_PROFILES)
def _inspect(data: bytes) -> _Profile:
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        space = profile.profile.xcolor_space
        if space not in SPACES:
            return _Profile(doubt=f"color profiles for `{space.strip()}` are not supported")
        description = profile.profile.profile_description or profile.profile.model or SPACE_NAMES[space]
        name = " ".join(description.split())[:SHOWN_OF_A_NAME]
        is_srgb = _is_srgb(data, SPACES[space])
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        return _Profile(doubt=f"damaged color profile ({error})")
    return _Profile(name, space, is_srgb)


def _is_srgb(data: bytes, mode: str) -> bool:
    """Return whether a profile leaves a grid of sRGB colors unchanged."""
    if mode not in ("RGB", "L"):
        return False
    import numpy as np

    levels = np.linspace(0, 255, PROBED_LEVELS if mode == "RGB" else 256).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(*[levels] * 3, indexing="ij"), -1).reshape(1, -1, 3) if mode == "RGB" else levels[None]
    probe = Image.fromarray(np.ascontiguousarray(grid))
    converted = ImageCms.applyTransform(probe, _transform(data, mode))
    return bool(np.abs(np.asarray(converted).astype(int) - np.asarray(probe.convert("RGB"))).max() <= SAME_COLOR)


@lru_cache(maxsize=KEPT_PROFILES)
def _transform(data: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
    return ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")


def _fits(space: str, mode: str) -> bool:
    """Return whether a profile of a color space can apply to pixels of a mode; gray counts as three equal channels."""
    gray = mode in ("1", "L", "LA", "La") or mode.startswith("I")
    return {
        "RGB ": mode in ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "YCbCr") or gray,
        "GRAY": gray,
        "CMYK": mode == "CMYK",
        "Lab ": mode == "LAB",
    }[space]


def _unfollowed(image: Image.Image) -> str:
    """Return what states, without a profile, that an image is not sRGB; empty if nothing does."""
    if image.format in ("JPEG", "MPO", "TIFF") and _is_marked_adobe_rgb(image):
        return "no color profile, but the EXIF data declares Adobe RGB"
    if image.format == "PNG" and "srgb" not in image.info:
        gamma = image.info.get("gamma")
        if gamma and abs(gamma - SRGB_GAMMA) > GAMMA_SLACK:
            return f"no color profile, but a gamma of {gamma:g} (gAMA)"
    points = _code_points(image) if image.format in ("PNG", "AVIF", "HEIF") else None
    if points and (points[0] not in SDR_PRIMARIES or points[1] not in SDR_TRANSFERS):
        return f"no color profile, but primaries {points[0]} and transfer {points[1]} (H.273)"
    return ""


def _is_marked_adobe_rgb(image: Image.Image) -> bool:
    exif = image.getexif()
    if not exif:
        return False
    index = exif.get_ifd(EXIF_IFD).get(INTEROPERABILITY_IFD, {})
    marked = exif.get_ifd(INTEROPERABILITY_IFD) or (index if isinstance(index, dict) else {})
    return (
        marked.get(INTEROPERABILITY_INDEX) == ADOBE_RGB_INDEX
        or exif.get_ifd(EXIF_IFD).get(EXIF_COLOR_SPACE) == ADOBE_RGB_COLOR_SPACE
    )


def _code_points(image: Image.Image) -> tuple[int, int] | None:
    """Return (primaries, transfer) of a PNG (cICP) or AVIF (nclx), which Pillow ignores."""
    stream = getattr(image, "fp", None)
    if stream is None:
        return None
    place = stream.tell()
    stream.seek(0)
    head = stream.read(HEAD_BYTES)
    stream.seek(place)
    png = head.find(b"cICP")
    if image.format == "PNG":
        return (head[png + 4], head[png + 5]) if 0 <= png < len(head) - 5 else None
    nclx = head.find(b"colrnclx")
    if not 0 <= nclx < len(head) - 11:
        return None
    return int.from_bytes(head[nclx + 8 : nclx + 10], "big"), int.from_bytes(head[nclx + 10 : nclx + 12], "big")

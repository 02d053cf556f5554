"""Color profiles are converted to sRGB as by Pillow, and marks of other color spaces without a profile are reported."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image, ImageCms

from diffsynth_core.data.images import SizeRule, load_image, read_image_header
from diffsynth_core.data.media import MediaRule, choose_target, load_pixels, read_media_header
from diffsynth_core.data.video_probe_cache import VideoProbeCache
from diffsynth_core.dataset_report.images import examine_image
from tests.icc import gray_profile, ink_profile, rgb_profile

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
WIDE = ["Display P3", "Adobe RGB (1998)"]


def colors(mode: str = "RGB") -> Image.Image:
    """An image of many colors, 64 wide and 48 high."""
    rows, columns = np.mgrid[0:48, 0:64]
    pixels = np.stack([rows * 5, columns * 4, (rows * 37 + columns * 11) % 256], -1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def by_pillow(path: Path) -> np.ndarray:
    """Convert an opaque image to sRGB with Pillow's own function."""
    with Image.open(path) as image:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return np.asarray(converted).astype(int)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif", "avif"])
@pytest.mark.parametrize("name", WIDE)
def test_wide_colors_become_those_of_srgb(tmp_path, name, ending):
    path = tmp_path / f"wide.{ending}"
    colors().save(path, icc_profile=rgb_profile(name))
    assert np.abs(load_image(path, 48, 64) - by_pillow(path)).max() <= 2
    assert read_image_header(path).colors.profile == name
    facts = examine_image(tmp_path, path.name, None)
    assert (facts.color_profile.profile, facts.fault) == (name, None)


def test_a_green_of_a_phone_is_the_green_that_its_screen_shows(tmp_path):
    Image.new("RGB", (32, 32), (93, 197, 70)).save(tmp_path / "p3.png", icc_profile=rgb_profile("Display P3"))
    assert (
        np.abs(load_image(tmp_path / "p3.png", 32, 32)[9, 9].astype(int) - (20, 200, 40)).max() <= 3
    )  # one step of P3


@pytest.mark.parametrize("profile", [SRGB, rgb_profile("sRGB IEC61966-2.1")], ids=["of Pillow", "IEC61966-2.1"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_a_profile_of_srgb_changes_no_pixel(tmp_path, profile, mode):
    colors(mode).save(tmp_path / "tagged.png", icc_profile=profile)
    colors(mode).save(tmp_path / "plain.png")
    assert_array_equal(load_image(tmp_path / "tagged.png", 48, 64), load_image(tmp_path / "plain.png", 48, 64))
    header = read_image_header(tmp_path / "tagged.png")
    assert (header.colors.profile, header.colors.doubt) == ("", "")


@pytest.mark.parametrize(
    ("mode", "ending", "profile"),
    [
        ("L", "png", gray_profile("Gray Gamma 1.0", 1.0)),
        ("L", "jpg", gray_profile("Dot Gain", 1.75)),
        ("CMYK", "jpg", ink_profile("A press")),
        ("CMYK", "tif", ink_profile("A press")),
    ],
)
def test_grays_and_inks_are_converted_by_their_profiles(tmp_path, mode, ending, profile):
    path = tmp_path / f"image.{ending}"
    colors(mode).save(path, icc_profile=profile, **({"quality": 100} if ending == "jpg" else {}))
    loaded = load_image(path, 48, 64)
    assert np.abs(loaded - by_pillow(path)).max() <= 2
    colors(mode).save(tmp_path / f"plain.{ending}")
    assert np.abs(loaded.astype(int) - load_image(tmp_path / f"plain.{ending}", 48, 64)).max() > 20


def test_sixteen_bit_grays_palettes_and_clear_parts_keep_their_ways(tmp_path):
    values = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png", icc_profile=gray_profile("linear", 1.0))
    assert abs(int(load_image(tmp_path / "deep.png", 48, 64)[24, 0, 0]) - 188) <= 2  # half the light
    image = colors("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    image.paste(colors().crop((0, 0, 64, 24)), (0, 0))
    image.save(tmp_path / "clear.png", icc_profile=rgb_profile("Display P3"))
    colors().save(tmp_path / "opaque.png", icc_profile=rgb_profile("Display P3"))
    loaded = load_image(tmp_path / "clear.png", 48, 64)
    assert_array_equal(loaded[:24], by_pillow(tmp_path / "opaque.png")[:24])
    assert loaded[24:].min() == 255
    gray = Image.merge("LA", (colors("L"), Image.new("L", (64, 48), 255)))
    gray.save(tmp_path / "gray.png", icc_profile=gray_profile("linear", 1.0))
    colors("L").save(tmp_path / "flat.png", icc_profile=gray_profile("linear", 1.0))
    assert_array_equal(load_image(tmp_path / "gray.png", 48, 64), load_image(tmp_path / "flat.png", 48, 64))


@pytest.mark.parametrize(
    ("mode", "profile", "doubt"),
    [
        ("RGB", b"no profile at all", "damaged color profile"),
        ("RGB", rgb_profile("Display P3")[:300], "damaged color profile"),
        ("RGB", gray_profile("Dot Gain", 1.75), "color profile `Dot Gain` is for gray, but the pixels are RGB"),
        ("L", ink_profile("A press"), "color profile `A press` is for CMYK, but the pixels are L"),
    ],
)
def test_a_profile_that_cannot_be_used_is_told_and_passed_over(tmp_path, mode, profile, doubt):
    colors(mode).save(tmp_path / "odd.png", icc_profile=profile)
    colors(mode).save(tmp_path / "plain.png")
    found = read_image_header(tmp_path / "odd.png").colors
    assert found.profile == "" and found.doubt.startswith(doubt)
    assert_array_equal(load_image(tmp_path / "odd.png", 48, 64), load_image(tmp_path / "plain.png", 48, 64))
    assert examine_image(tmp_path, "odd.png", None).color_profile == found


def with_chunk(path: Path, kind: bytes, data: bytes) -> None:
    """Insert a chunk after the header of a PNG."""
    content = path.read_bytes()
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content[:33] + chunk + content[33:])


@pytest.mark.parametrize(
    ("kind", "data", "doubt"),
    [
        (b"gAMA", struct.pack(">I", 100_000), "a gamma of 1 (gAMA)"),
        (b"gAMA", struct.pack(">I", 45_455), ""),
        (b"cICP", bytes([9, 16, 0, 1]), "primaries 9 and transfer 16 (H.273)"),
        (b"cICP", bytes([1, 13, 0, 1]), ""),
    ],
)
def test_what_a_png_says_without_a_profile_is_told(tmp_path, kind, data, doubt):
    colors().save(tmp_path / "image.png")
    with_chunk(tmp_path / "image.png", kind, data)
    assert read_image_header(tmp_path / "image.png").colors.doubt.endswith(doubt)
    assert bool(read_image_header(tmp_path / "image.png").colors.doubt) == bool(doubt)
    assert_array_equal(load_image(tmp_path / "image.png", 48, 64), np.asarray(colors()))


def test_adobe_rgb_of_a_camera_without_a_profile_is_told(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = 0xFFFF
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    colors().save(tmp_path / "camera.jpg", exif=exif)
    assert "Adobe RGB" in read_image_header(tmp_path / "camera.jpg").colors.doubt


def test_encodings_of_converted_images_are_new_and_all_others_stay(tmp_path):
    colors().save(tmp_path / "p3.png", icc_profile=rgb_profile("Display P3"))
    colors().save(tmp_path / "srgb.png", icc_profile=SRGB)
    rule = MediaRule(SizeRule(None, None, 1 << 20, 16))
    videos = VideoProbeCache(tmp_path / "memory")
    crops = {
        name: choose_target(tmp_path / name, read_media_header(tmp_path / name, rule, videos), rule, 1)
        for name in ("p3.png", "srgb.png")
    }
    assert crops["srgb.png"].transform == [48, 64, 1]  # as before there were conversions
    assert crops["p3.png"].transform == [48, 64, 1, "sRGB", 1]
    assert np.abs(load_pixels(crops["p3.png"])[0] - by_pillow(tmp_path / "p3.png")).max() <= 2


def test_integers_of_thirty_two_bits_are_refused_and_not_clipped(tmp_path):
    Image.fromarray(np.full((32, 32), 1 << 20, np.int32)).save(tmp_path / "deep.tif")
    assert "32-bit" in examine_image(tmp_path, "deep.tif", None).fault.reason

"""Images: orientation, transparency, dtypes and geometry, on real files written with Pillow."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from diffsynth_core.data.images import EXIF_ORIENTATION, SizeRule, load_image, read_image_header

STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: upright.transpose(1, 0, 2)[::-1],
    7: lambda upright: upright.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda upright: upright.transpose(1, 0, 2)[:, ::-1],
}
"""How an upright image is stored for each EXIF orientation: the sides of row 0 and column 0 (TIFF 6.0)."""


def upright_pixels(height: int = 32, width: int = 48) -> np.ndarray:
    """An image without any symmetry."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 5, columns * 5, (rows * 3 + columns) % 251], axis=-1).astype(np.uint8)


def save_oriented(path, orientation: int, **settings) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    Image.fromarray(np.ascontiguousarray(STORED.get(orientation, STORED[1])(upright_pixels()))).save(
        path, exif=exif, **settings
    )


@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_comes_out_upright(tmp_path, orientation, ending):
    path = tmp_path / f"image.{ending}"
    save_oriented(path, orientation, **({"lossless": True} if ending == "webp" else {}))
    assert_array_equal(load_image(path, 32, 48), upright_pixels())
    header = read_image_header(path)
    assert (header.width, header.height, header.rotated) == (48, 32, orientation != 1)


@pytest.mark.parametrize("ending", ["jpg", "avif"])
@pytest.mark.parametrize("orientation", STORED)
def test_lossy_images_come_out_upright(tmp_path, orientation, ending):
    path = tmp_path / f"image.{ending}"
    save_oriented(path, orientation, quality=100, subsampling="4:4:4")
    assert (read_image_header(path).width, read_image_header(path).height) == (48, 32)
    difference = load_image(path, 32, 48).astype(int) - upright_pixels()
    assert abs(difference).mean() < 8


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_does_not_exist_changes_nothing(tmp_path, orientation):
    save_oriented(tmp_path / "image.png", orientation)
    assert_array_equal(load_image(tmp_path / "image.png", 32, 48), upright_pixels())
    assert not read_image_header(tmp_path / "image.png").rotated


def in_mode(mode: str) -> tuple[Image.Image, dict, list[int]]:
    """16 columns each of transparent, half transparent and opaque black; options for saving; and the expected
    result on white.
    """
    alpha = np.repeat(np.array([[0, 128, 255]], np.uint8), 16, axis=1).repeat(16, axis=0)
    black = np.zeros_like(alpha)
    if mode == "P bytes":
        image = Image.fromarray(np.repeat(np.arange(3, dtype=np.uint8)[None], 16, axis=1).repeat(16, axis=0))
        image.putpalette([0, 0, 0] * 3)
        return image, {"transparency": bytes([0, 128, 255])}, [255, 127, 0]
    if mode == "P index":
        image = Image.fromarray(np.repeat(np.arange(3, dtype=np.uint8)[None], 16, axis=1).repeat(16, axis=0))
        image.putpalette([9, 9, 9, 7, 7, 7, 0, 0, 0])
        return image, {"transparency": 0}, [255, 7, 0]
    if mode in ("L", "RGB"):
        gray = Image.fromarray(np.repeat(np.array([[9, 7, 0]], np.uint8), 16, axis=1).repeat(16, axis=0))
        return gray.convert(mode), {"transparency": 9 if mode == "L" else (9, 9, 9)}, [255, 7, 0]
    bands = [black] * (1 if mode == "LA" else 3) + [alpha]
    return Image.merge(mode, [Image.fromarray(band) for band in bands]), {}, [255, 127, 0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P bytes", "P index", "L", "RGB"])
def test_transparency_is_composed_on_white(tmp_path, mode):
    image, settings, expected = in_mode(mode)
    image.save(tmp_path / "clear.png", **settings)
    loaded = load_image(tmp_path / "clear.png", 16, 48)
    assert_allclose(loaded[8, [8, 24, 40]].astype(int), [[value] * 3 for value in expected], atol=1)
    assert read_image_header(tmp_path / "clear.png").transparent


def test_transparency_survives_turning_upright(tmp_path):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    in_mode("RGBA")[0].transpose(Image.Transpose.ROTATE_90).save(tmp_path / "both.png", exif=exif)
    assert_allclose(load_image(tmp_path / "both.png", 16, 48)[8, [8, 24, 40], 0].astype(int), [255, 127, 0], atol=1)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bit_grays_are_scaled_and_not_clipped(tmp_path, ending):
    values = np.array([[0, 257, 32896, 65278, 65535]], np.uint16).repeat(16, axis=0).repeat(16, axis=1)
    Image.fromarray(values).save(tmp_path / f"gray.{ending}")
    loaded = load_image(tmp_path / f"gray.{ending}", 16, 80)
    assert loaded[8, 8::16].tolist() == [[value] * 3 for value in (0, 1, 128, 254, 255)]
    assert not read_image_header(tmp_path / f"gray.{ending}").transparent


def test_a_sixteen_bit_gray_with_a_transparent_value_is_composed_on_white(tmp_path):
    values = np.array([[0, 32896, 65535]], np.uint16).repeat(16, axis=0).repeat(16, axis=1)
    Image.fromarray(values).save(tmp_path / "gray.png", transparency=0)
    assert read_image_header(tmp_path / "gray.png").transparent
    assert load_image(tmp_path / "gray.png", 16, 48)[8, 8::16, 0].tolist() == [255, 128, 255]


@pytest.mark.parametrize("ink", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255)])
def test_inks_become_light(tmp_path, ink):
    Image.new("CMYK", (32, 32), ink).save(tmp_path / "print.jpg", quality=100)
    cyan, magenta, yellow, black = (value / 255 for value in ink)
    expected = [round(255 * (1 - part) * (1 - black)) for part in (cyan, magenta, yellow)]
    assert_allclose(load_image(tmp_path / "print.jpg", 32, 32)[16, 16].astype(int), expected, atol=3)


@pytest.mark.parametrize(
    ("mode", "ending"), [("1", "png"), ("L", "png"), ("P", "gif"), ("YCbCr", "jpg"), ("RGBX", "tif")]
)
def test_other_modes_become_rgb(tmp_path, mode, ending):
    path = tmp_path / f"half.{ending}"
    image = Image.new("RGB", (64, 32), "white")
    image.paste("black", (32, 0, 64, 32))
    image.convert(mode).save(path)
    loaded = load_image(path, 32, 64)
    assert loaded.shape == (32, 64, 3)
    assert loaded.dtype == np.uint8
    assert loaded[:, :24].min() >= 245
    assert loaded[:, 40:].max() <= 10


FIXED = SizeRule(height=64, width=96, max_pixels=1, factor=16)
DYNAMIC = SizeRule(height=None, width=None, max_pixels=1024 * 1024, factor=16)


def test_a_fixed_size_holds_for_all_images():
    assert {FIXED.target(width, height) for width, height in [(10, 10), (64, 96), (5000, 20)]} == {(64, 96)}


@pytest.mark.parametrize("one_side", [SizeRule(64, None, 1 << 20, 16), SizeRule(None, 64, 1 << 20, 16)])
def test_one_side_alone_fixes_nothing(one_side):
    assert one_side.target(500, 300) == (288, 496)


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1024, 1024, (1024, 1024)),
        (2048, 512, (512, 2048)),
        (512, 2048, (2048, 512)),
        (16, 65536, (65536, 16)),
        (1040, 1008, (1008, 1040)),  # 256 pixels below the limit
        (2048, 2048, (1024, 1024)),
        (4096, 1024, (512, 2048)),
        (500, 300, (288, 496)),
        (16, 16, (16, 16)),
        (31, 33, (32, 16)),
        (15, 400, (400, 0)),
        (4000, 3000, (880, 1168)),  # times 0.29560: 886.8 x 1182.4
        (10**6, 17, (0, 248352)),  # times 0.24836: 4.2 x 248364
    ],
)
def test_dynamic_sizes(width, height, expected):
    assert DYNAMIC.target(width, height) == expected


@pytest.mark.parametrize("max_pixels", [256, 512 * 512, 1024 * 1024, 1328 * 1328, 999_983])
def test_dynamic_sizes_keep_the_rule_for_all_images(max_pixels):
    rule = SizeRule(None, None, max_pixels, 16)
    for width in range(16, 4000, 97):
        for height in range(16, 4000, 89):
            tall, wide = rule.target(width, height)
            assert tall % 16 == wide % 16 == 0
            assert tall <= height and wide <= width and tall * wide <= max_pixels
            scale = min(1, (max_pixels / width / height) ** 0.5)
            assert tall > height * scale - 16.001 and wide > width * scale - 16.001


@pytest.mark.parametrize(
    ("side", "max_pixels", "expected"),
    [(1440, 1008**2, 1008), (880, 240**2, 240), (1584, 432**2, 432), (3000, 1000**2, 992)],
)
def test_rounding_takes_no_row_from_an_image_that_fits_exactly(side, max_pixels, expected):
    assert SizeRule(None, None, max_pixels, 16).target(side, side) == (expected, expected)


@pytest.mark.parametrize("factor", [16, 32])
def test_an_image_of_exactly_max_pixels_loses_nothing(factor):
    for wide in range(factor, 3000, factor):
        for tall in (factor, 33 * factor, 61 * factor):
            assert SizeRule(None, None, wide * tall, factor).target(wide, tall) == (tall, wide)

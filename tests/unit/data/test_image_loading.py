"""Cropping images to their training size, damaged files, and headers that agree with decoding."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from diffsynth_core.data.images import EXIF_ORIENTATION, load_image, read_image_header
from diffsynth_core.errors import DiffSynthError


def coordinates(height: int, width: int) -> np.ndarray:
    """Red encodes the row, green the column."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows, columns, rows * 0], axis=-1).astype(np.uint8)


def save(path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    ("size", "target", "top", "left"),
    [
        ((64, 96), (64, 96), 0, 0),
        ((64, 96), (64, 64), 0, 16),
        ((96, 64), (64, 64), 16, 0),
        ((64, 97), (64, 64), 0, 16),
        ((64, 67), (64, 64), 0, 1),
    ],
)
def test_what_covers_already_is_only_cut_at_the_centre(tmp_path, size, target, top, left):
    save(tmp_path / "a.png", coordinates(*size))
    loaded = load_image(tmp_path / "a.png", *target)
    assert loaded.shape == (*target, 3)
    assert loaded.dtype == np.uint8
    assert_array_equal(loaded, coordinates(*size)[top : top + target[0], left : left + target[1]])


@pytest.mark.parametrize(
    ("size", "target", "cut"),
    [
        ((128, 256), (32, 32), (slice(0, 128), slice(64, 192))),
        ((256, 128), (64, 64), (slice(64, 192), slice(0, 128))),
        ((200, 240), (50, 30), (slice(0, 200), slice(60, 180))),
        ((32, 32), (64, 128), (slice(8, 24), slice(0, 32))),
    ],
)
def test_an_image_is_scaled_to_cover_and_cut_at_the_centre(tmp_path, size, target, cut):
    save(tmp_path / "a.png", coordinates(*size))
    loaded = load_image(tmp_path / "a.png", *target).astype(float)
    seen = coordinates(*size)[cut].astype(float)
    inner = (slice(4, -4), slice(4, -4))
    for channel, axis in ((0, 1), (1, 0)):
        means = loaded[..., channel].mean(axis)
        expected = np.interp(
            (np.arange(len(means)) + 0.5) / len(means),
            [0, 1],
            [seen[..., channel].min() - 0.5, seen[..., channel].max() + 0.5],
        )
        assert_allclose(means[4:-4], expected[4:-4], atol=1.5)
    assert loaded[inner].std() > 0


@pytest.mark.parametrize(("height", "width"), [(33, 50), (47, 1000), (1000, 47), (101, 99)])
@pytest.mark.parametrize("target", [(32, 32), (48, 16), (16, 64)])
def test_any_size_fills_any_target_without_a_border(tmp_path, height, width, target):
    save(tmp_path / "a.png", np.full((height, width, 3), 200, np.uint8))
    assert_array_equal(load_image(tmp_path / "a.png", *target), np.full((*target, 3), 200, np.uint8))


def files_of_all_kinds(folder) -> list:
    """One file per kind, 40 wide and 24 high when upright."""
    gray = np.arange(24 * 40, dtype=np.uint16).reshape(24, 40) * 60
    rgb = Image.fromarray(coordinates(24, 40))
    sideways = Image.Exif()
    sideways[EXIF_ORIENTATION] = 8
    Image.fromarray(gray).save(folder / "gray16.png")
    rgb.transpose(Image.Transpose.ROTATE_270).save(folder / "sideways.jpg", exif=sideways)
    rgb.save(folder / "progressive.jpg", progressive=True)
    rgb.convert("CMYK").save(folder / "cmyk.tif")
    rgb.convert("P").save(folder / "palette.gif")
    rgb.save(folder / "lossless.webp", lossless=True)
    rgb.save(folder / "plain.bmp")
    rgb.save(folder / "plain.avif")
    return sorted(folder.iterdir())


def test_headers_agree_with_decoding_for_every_kind_of_file(tmp_path):
    paths = files_of_all_kinds(tmp_path)
    assert len(paths) == 8
    for path in paths:
        header = read_image_header(path)
        assert (header.width, header.height) == (40, 24), path
        loaded = load_image(path, header.height, header.width)
        assert loaded.shape == (24, 40, 3)
        assert loaded[:, 30:].mean() > loaded[:, :10].mean(), path  # upright


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif"])
def test_a_truncated_file_is_told_when_decoded(tmp_path, ending):
    path = tmp_path / f"cut.{ending}"
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    save(path, noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DiffSynthError) as caught:
        load_image(path, 64, 64)
    assert f"`{path}` cannot be read as an image" in str(caught.value)
    assert caught.value.problems[0].hint


@pytest.mark.parametrize("read", [read_image_header, lambda path: load_image(path, 16, 16)], ids=["header", "pixels"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "the file is empty"), (b"hello, I am no image", "cannot identify"), (None, "No such file")],
)
def test_what_is_no_image_is_told(tmp_path, read, content, reason):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DiffSynthError, match=reason) as caught:
        read(path)
    assert str(caught.value).count(str(path)) == 1


def test_a_folder_with_the_name_of_an_image_is_told(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(DiffSynthError, match=r"a\.png` cannot be read as an image"):
        read_image_header(tmp_path / "a.png")


def test_a_stretched_image_is_shown_whole(tmp_path):
    save(tmp_path / "a.png", coordinates(64, 200))
    loaded = load_image(tmp_path / "a.png", 32, 48, (32, 48)).astype(int)
    assert loaded.shape == (32, 48, 3)
    assert_array_equal(loaded, np.asarray(Image.open(tmp_path / "a.png").resize((48, 32), Image.Resampling.LANCZOS)))
    corners = [loaded[row, column, :2].tolist() for row, column in ((0, 0), (-1, -1))]
    assert_allclose(corners, [[0, 0], [63, 199]], atol=3)


def test_what_is_read_of_a_scaled_image_is_its_middle(tmp_path):
    save(tmp_path / "a.png", coordinates(64, 200))
    loaded = load_image(tmp_path / "a.png", 32, 48, (64, 200))
    assert_array_equal(loaded, coordinates(64, 200)[16:48, 76:124])

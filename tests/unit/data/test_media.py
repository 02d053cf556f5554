"""The frames of a file to train on, as pure functions; and what of them identifies an encoding."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffsynth_core.data.conditions import Condition
from diffsynth_core.data.images import ImageHeader, SizeRule, read_image_header
from diffsynth_core.data.media import (
    FrameRule,
    MediaCrop,
    MediaHeader,
    MediaRule,
    choose_reference,
    choose_target,
    load_pixels,
)
from diffsynth_core.models.dataset_columns import MASKS


def rule(num_frames=49, start="first", seed=0, frame_rate=None):
    return FrameRule(num_frames, 4, frame_rate, start, seed)


@pytest.mark.parametrize(
    ("available", "length"),
    [(200, 49), (49, 49), (48, 45), (46, 45), (45, 45), (7, 5), (5, 5), (4, 1), (1, 1)],
)
def test_a_clip_is_cut_to_four_n_and_one(available, length):
    assert rule().length(available) == length
    for start in ("first", "middle", "random"):
        first = rule(start=start).first(available, row=3)
        assert 0 <= first <= available - length


def test_where_a_clip_begins():
    assert rule(start="first").first(150, 1) == 0
    assert rule(start="middle").first(150, 1) == 50
    starts = {rule(start="random").first(150, row) for row in range(2000)}
    assert starts == set(range(102))  # 0 .. 150 - 49


def test_a_random_start_depends_on_seed_and_row_alone():
    def starts(seed):
        return [rule(start="random", seed=seed).first(500, row) for row in range(20)]

    assert starts(1) == starts(1) != starts(2)


@pytest.mark.parametrize(("start", "limit"), [("first", 49), ("middle", None), ("random", None)])
def test_frames_are_counted_no_further_than_needed(start, limit):
    assert rule(start=start).frames_to_count == limit


def test_the_crop_of_a_video():
    media = MediaRule(SizeRule(64, 96, 1 << 20, 16), rule(17, "middle", frame_rate=16))
    header = MediaHeader(320, 240, 30, video=True, rotated=False, transparent=False)
    crop = choose_target(Path("a.mp4"), header, media, row=1)
    assert crop == MediaCrop(Path("a.mp4"), 64, 96, True, start=6, frames=17, frame_rate=16)
    assert crop.shape == (17, 64, 96)
    assert crop.first_frame.shape == (1, 64, 96)


def test_an_image_among_videos_is_one_frame():
    media = MediaRule(SizeRule(None, None, 1 << 20, 16), rule(17))
    header = MediaHeader(100, 50, 1, video=False, rotated=False, transparent=False)
    assert choose_target(Path("a.png"), header, media, row=1) == MediaCrop(Path("a.png"), 48, 96)


def test_whatever_changes_the_pixels_changes_the_identity():
    base = MediaCrop(Path("a.mp4"), 64, 96, True, 0, 17, None)
    others = [
        MediaCrop(Path("a.mp4"), 64, 96, True, 1, 17, None),
        MediaCrop(Path("a.mp4"), 64, 96, True, 0, 13, None),
        MediaCrop(Path("a.mp4"), 64, 96, True, 0, 17, 16.0),
        MediaCrop(Path("a.mp4"), 80, 96, True, 0, 17, None),
        MediaCrop(Path("a.mp4"), 64, 96, False),
    ]
    assert all(other.transform != base.transform for other in others)
    assert MediaCrop(Path("b.mp4"), 64, 96, True, 0, 17, None).transform == base.transform


def test_a_reference_is_read_at_the_size_of_its_rule():
    shown = Condition("shown", "edit_image", lambda width, height, most: (height * 2, width + most), factor=16)
    header = ImageHeader(100, 50, rotated=False, transparent=False)
    target = MediaCrop(Path("b.png"), 32, 48)
    found = choose_reference(Path("a.png"), header, shown, target, 7)
    assert found == MediaCrop(Path("a.png"), 96, 96, scaled=(100, 107))
    assert len({str(replace(found, scaled=scaled).transform) for scaled in (None, (100, 107), (107, 100))}) == 3
    over = choose_reference(Path("a.png"), header, replace(shown, size="target"), target, 7)
    assert over == MediaCrop(Path("a.png"), 32, 48), "that of what is trained on"


def gradient(path: Path, mode: str = "L") -> Path:
    """A mask of 40 x 20 pixels: black on the left, white on the right, saved as Pillow's `mode`."""
    mask = Image.new("L", (40, 20))
    mask.paste(255, (20, 0, 40, 20))
    mask.convert(mode).save(path)
    return path


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.column)
def test_each_column_that_is_checked_as_a_mask_can_be_read(tmp_path, mask, mode):
    path = gradient(tmp_path / "mask.png", mode)
    crop = choose_reference(path, read_image_header(path), mask, MediaCrop(Path("b.png"), 32, 48), 1 << 20)
    assert crop == MediaCrop(path, 32, 48, mask=True) and crop.transform != MediaCrop(path, 32, 48).transform
    pixels = load_pixels(crop)
    assert (pixels.shape, pixels.dtype) == ((1, 32, 48, 1), np.uint8)
    assert (pixels[..., :20, :] == 0).all() and (pixels[..., 28:, :] == 255).all()
    assert (np.diff(pixels[0, 0, :, 0].astype(int)) >= 0).all(), "scaling rings nowhere"


def test_a_condition_whose_size_is_not_known_is_not_loaded():
    header = ImageHeader(100, 50, rotated=False, transparent=False)
    with pytest.raises(ValueError, match="the size of `mask` is not known"):
        choose_reference(Path("a.png"), header, Condition("mask", "mask"), MediaCrop(Path("b.png"), 32, 48), 7)

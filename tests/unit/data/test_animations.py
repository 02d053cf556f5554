"""Animated images are clips: the frames of the file, with its timing, resampled as by ffmpeg."""

import numpy as np
import pytest
from PIL import Image

from diffsynth_core.data.animations import is_animation
from diffsynth_core.data.images import SizeRule, read_image_header
from diffsynth_core.data.media import FrameRule, MediaRule, choose_target, load_pixels, read_media_header
from diffsynth_core.data.video_probe_cache import VideoProbeCache
from diffsynth_core.data.videos import count_frames, load_clip, read_video_header
from diffsynth_core.dataset_report.inspect import EXAMINERS, Job
from diffsynth_core.errors import DiffSynthError
from tests.clips import numbered, numbers
from tests.icc import rgb_profile

pytestmark = pytest.mark.video

LOSSLESS = {"webp": {"lossless": True}, "png": {}, "apng": {}, "avif": {"quality": 100, "subsampling": "4:4:4"}}
DURATIONS = [40, 40, 120, 80, 40, 200, 40, 40, 60, 340, 40, 100]


def write(path, frames=None, durations=DURATIONS, **settings):
    images = [Image.fromarray(frame) for frame in (numbered(12) if frames is None else frames)]
    form = {"format": "PNG"} if path.suffix == ".apng" else {}
    settings = {**LOSSLESS.get(path.suffix[1:], {}), **form, **settings}
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, **settings)
    return path


@pytest.mark.parametrize("ending", LOSSLESS)
def test_every_frame_is_read(tmp_path, ending):
    path = write(tmp_path / f"moves.{ending}")
    assert is_animation(path)
    header = read_video_header(path)
    assert (header.width, header.height, header.frame_rate) == (64, 48, round(12000 / sum(DURATIONS), 2))
    assert (count_frames(path, None, None), count_frames(path, None, 7)) == (12, 7)
    assert numbers(load_clip(path, 2, 8, 48, 64, None)) == list(range(2, 10))


@pytest.mark.parametrize("rate", [2, 8, 12, 25, 30])
def test_frames_are_resampled_as_ffmpeg_resamples_those_of_a_gif(tmp_path, rate):
    gif, webp = write(tmp_path / "moves.gif"), write(tmp_path / "moves.webp")
    count = count_frames(gif, rate, None)
    assert count_frames(webp, rate, None) == count
    expected, found = (load_clip(path, 0, count, 48, 64, rate) for path in (gif, webp))
    assert np.abs(expected.astype(int) - found).max() <= 8  # of a palette


def test_clear_parts_are_white_and_colors_are_converted(tmp_path):
    clear = np.concatenate([numbered(3), np.full((3, 48, 64, 1), 255, np.uint8)], -1)
    clear[:, 40:, 56:, 3] = 0
    path = write(tmp_path / "clear.webp", clear, 100, icc_profile=rgb_profile("Display P3"))
    clip = load_clip(path, 0, 3, 48, 64, None)
    assert clip[:, 45, 60].tolist() == [[255] * 3] * 3
    assert np.abs(clip[0, 2, 60].astype(int) - (0, 255, 0)).max() <= 2


def test_a_file_that_ends_early_is_told(tmp_path):
    path = write(tmp_path / "moves.webp", np.random.default_rng(0).integers(0, 255, (6, 48, 64, 3), dtype=np.uint8), 40)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DiffSynthError, match=r"moves\.webp` cannot be read"):
        read_media_header(path, MediaRule(SizeRule(None, None, 1 << 20, 16), FRAMES), VideoProbeCache(tmp_path / "m"))


FRAMES = FrameRule(9, 4, None, "first", 0)


@pytest.mark.parametrize("name", ["moves.webp", "moves.png", "moves.jpg"])
def test_a_model_of_videos_trains_on_its_frames(tmp_path, name):
    path = write(tmp_path / name, format="WEBP" if name.endswith("jpg") else None, lossless=True)
    rule = MediaRule(SizeRule(None, None, 1 << 20, 16), FRAMES)
    header = read_media_header(path, rule, VideoProbeCache(tmp_path / "memory"))
    assert (header.video, header.frames) == (True, 9)
    crop = choose_target(path, header, rule, 1)
    assert numbers(load_pixels(crop)) == list(range(9))
    facts = EXAMINERS["video"](Job(tmp_path), name)
    assert (facts.frames, facts.fault, facts.still) == (12, None, False)


@pytest.mark.parametrize("name", ["moves.webp", "moves.png", "moves.gif", "moves.avif"])
def test_a_model_of_images_refuses_it_by_name(tmp_path, name):
    path = write(tmp_path / name)
    with pytest.raises(DiffSynthError, match=r"`.*/moves\.\w+` is animated \(12 frames\)") as caught:
        read_image_header(path)
    assert "save one frame" in caught.value.problems[0].hint
    assert EXAMINERS["image"](Job(tmp_path), name).frames == 12


def test_a_still_is_no_animation(tmp_path):
    for name in ("one.webp", "one.png", "one.gif"):
        Image.fromarray(numbered(1)[0]).save(tmp_path / name)
        assert not is_animation(tmp_path / name)
        assert read_image_header(tmp_path / name).width == 64

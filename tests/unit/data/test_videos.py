"""Videos: the frames returned, their geometry and colors, on real files of every container."""

import multiprocessing
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from diffsynth_core.data import decoding
from diffsynth_core.data.formats import CLIP_ENDINGS
from diffsynth_core.data.images import load_image
from diffsynth_core.data.videos import count_frames, load_clip, read_video_header
from diffsynth_core.errors import DiffSynthError
from tests.clips import LOSSLESS, LOSSY, detailed, ffmpeg, numbered, numbers, write_clip

pytestmark = pytest.mark.video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def thirty(folder):
    """30 numbered frames, encoded out of order."""
    return write_clip(folder / "thirty.mp4", numbered(30))


@pytest.mark.parametrize("ending", [*LOSSLESS, *LOSSY])
def test_every_container_is_read(tmp_path, ending):
    path = write_clip(tmp_path / f"clip.{ending}", numbered(30))
    header = read_video_header(path)
    assert (header.width, header.height, header.rotated, header.frame_rate) == (64, 48, False, 25)
    assert (count_frames(path, None, None), count_frames(path, None, 7)) == (30, 7)
    assert numbers(load_clip(path, 5, 10, 48, 64, None)) == list(range(5, 15))
    assert f".{ending}" in CLIP_ENDINGS


@pytest.mark.parametrize("ending", LOSSLESS)
def test_pixels_of_the_same_size_are_the_very_ones(tmp_path, ending):
    frames = detailed(4, 48, 64)
    clip = load_clip(write_clip(tmp_path / f"clip.{ending}", frames), 0, 4, 48, 64, None)
    assert (clip.shape, clip.dtype) == ((4, 48, 64, 3), np.uint8)
    assert_array_equal(clip, frames)


@pytest.mark.parametrize(("start", "frames"), [(0, 30), (5, 1), (5, 25), (29, 1), (13, 4)])
def test_exactly_the_frames_asked_for_come(thirty, start, frames):
    assert numbers(load_clip(thirty, start, frames, 48, 64, None)) == list(range(start, start + frames))


def test_no_frame_of_a_variable_rate_is_doubled_or_dropped(tmp_path):
    times = "setpts='(N*N+N)/TB/40'"
    for ending in ("mp4", "mkv"):
        path = write_clip(tmp_path / f"clip.{ending}", numbered(20), "-vf", times, "-fps_mode", "passthrough",
                          *LOSSLESS[ending])  # fmt: skip
        assert count_frames(path, None, None) == 20
        assert numbers(load_clip(path, 0, 20, 48, 64, None)) == list(range(20))
        # shown at 0, 0.04, 0.12, 0.28, 0.48, 0.72, 1.04, 1.4, 1.8, 2.24 … seconds: the last before 0.125, 0.375 …
        assert numbers(load_clip(path, 0, 10, 48, 64, 4)) == [2, 3, 4, 5, 6, 6, 7, 8, 8, 9]


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(25, range(30)), (12.5, range(0, 30, 2)), (5, range(2, 30, 5)), (50, [n // 2 for n in range(60)])],
)
def test_resampling_takes_the_nearest_frames_in_time(thirty, rate, expected):
    expected = list(expected)
    assert count_frames(thirty, rate, None) == len(expected)
    taken = numbers(load_clip(thirty, 0, len(expected), 48, 64, rate))
    assert max(abs(number - wanted) for number, wanted in zip(taken, expected, strict=True)) <= 1
    assert numbers(load_clip(thirty, 3, 2, 48, 64, rate)) == taken[3:5]
    assert count_frames(thirty, rate, 4) == 4


def test_a_header_that_lies_about_its_frames_is_not_believed(tmp_path):
    path = write_clip(tmp_path / "clip.mkv", numbered(30))
    content = path.read_bytes()
    place = content.index(b"\x44\x89\x88") + 3  # Duration, a float of 8 bytes
    path.write_bytes(content[:place] + np.array(9e6, ">f8").tobytes() + content[place + 8 :])
    assert count_frames(path, None, None) == 30


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_rotated_videos_come_out_upright(tmp_path, angle):
    upright = numbered(6)
    stored = np.rot90(upright, angle // 90, (1, 2))
    path = write_clip(tmp_path / "clip.mov", stored, *LOSSLESS["mov"],
                      before=("-noautorotate", "-display_rotation:v", str(-angle)))  # fmt: skip
    header = read_video_header(path)
    assert (header.width, header.height, header.rotated) == (64, 48, True)
    assert_array_equal(load_clip(path, 1, 5, 48, 64, None), upright[1:])


@pytest.mark.parametrize("turned", [False, True])
def test_pixels_that_are_not_square_are_made_square(tmp_path, turned):
    frames = np.rot90(numbered(2), 1, (1, 2)) if turned else numbered(2)
    before = ("-noautorotate", "-display_rotation:v", "-90") if turned else ()
    aspect = "3/4" if turned else "4/3"
    path = write_clip(tmp_path / "clip.mov", frames, "-vf", f"setsar={aspect}", *LOSSLESS["mov"], before=before)
    header = read_video_header(path)
    assert (header.width, header.height) == (85, 48)
    clip = load_clip(path, 0, 1, 48, 85, None)[0]
    assert clip[2, 17].argmax() == 0
    assert clip[2, 67].argmax() == 1
    assert clip[20, 17].max() < 8


@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((35, 20), (30, 48)), ((33, 20), (30, 48)), ((65, 49), (49, 65)), ((97, 51), (32, 32)), ((51, 97), (64, 48)),
        ((200, 120), (64, 112)), ((64, 48), (96, 64)),
    ],
)  # fmt: skip
def test_the_geometry_is_that_of_images(tmp_path, size, target):
    """(35, 20) for 30 rows is 52.5 wide, which Python rounds to 52."""
    width, height = size
    frames = detailed(1, height, width)
    Image.fromarray(frames[0]).save(tmp_path / "frame.png")
    expected = load_image(tmp_path / "frame.png", *target).astype(int)
    clip = load_clip(write_clip(tmp_path / "clip.mkv", frames), 0, 1, *target, None)[0].astype(int)
    assert clip.shape == expected.shape
    difference = abs(clip - expected)
    assert difference.mean() < 1.5 and difference.max() < 25
    for shift in (-1, 1):
        assert abs(np.roll(clip, shift, 1) - expected)[:, 1:-1].mean() > 2 * difference.mean()


@pytest.mark.parametrize(
    ("matrix", "spread"), [("bt709", "tv"), ("bt709", "pc"), ("smpte170m", "tv"), ("bt2020nc", "tv"), (None, "tv")]
)
@pytest.mark.parametrize("pixels", ["yuv420p", "yuv444p10le"])
def test_colors_follow_the_tags(tmp_path, matrix, spread, pixels):
    colors = np.array([[200, 30, 40], [30, 180, 60], [40, 60, 210], [128, 128, 128], [230, 220, 40]], np.uint8)
    frames = np.broadcast_to(colors.repeat(32, axis=0)[None, None], (2, 32, 160, 3))
    conversion = f"scale=out_color_matrix={matrix or 'smpte170m'}:out_range={spread}:flags=accurate_rnd"
    tags = ["-colorspace", matrix, "-color_range", spread] if matrix else []
    coding = ["-c:v", "libx264", "-qp", "0", *tags]
    path = write_clip(tmp_path / "clip.mp4", frames, "-vf", f"{conversion},format={pixels}", *coding)
    clip = load_clip(path, 0, 2, 32, 160, None)
    assert_allclose(clip[1, 16, 16::32].astype(int), colors, atol=3)


def test_what_is_clear_in_a_gif_is_white(tmp_path):
    image = Image.new("P", (64, 32), 1)
    image.putpalette([9, 9, 9, 200, 0, 0])
    image.paste(0, (0, 0, 32, 32))
    image.save(tmp_path / "clip.gif", save_all=True, append_images=[image], transparency=0, duration=100)
    clip = load_clip(tmp_path / "clip.gif", 0, 1, 32, 64, None)[0]
    assert_allclose(clip[16, [8, 56]].astype(int), [[255, 255, 255], [200, 0, 0]], atol=2)


def test_a_change_of_size_does_not_restart_the_count(tmp_path):
    for name, width in (("a", 64), ("b", 96)):
        write_clip(tmp_path / f"{name}.h264", numbered(10, width=width), "-c:v", "libx264", "-qp", "0")
    joined = tmp_path / "joined.h264"
    joined.write_bytes((tmp_path / "a.h264").read_bytes() + (tmp_path / "b.h264").read_bytes())
    ffmpeg("-r", 25, "-i", joined, "-c", "copy", tmp_path / "joined.mp4")
    frames = count_frames(tmp_path / "joined.mp4", None, None)
    assert frames > 15
    assert count_frames(tmp_path / "joined.mp4", None, 14) == 14
    taken = numbers(load_clip(tmp_path / "joined.mp4", 5, frames - 5, 48, 64, None))
    assert taken[:5] == [5, 6, 7, 8, 9]


def test_the_first_stream_that_is_no_cover_is_read(tmp_path, thirty):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "cover.png")
    ffmpeg("-i", tmp_path / "cover.png", "-f", "lavfi", "-i", "sine=d=1", "-i", thirty, "-map", 0, "-map", 1, "-map", 2,
           "-c:v", "copy", "-disposition:v:0", "attached_pic", tmp_path / "clip.mp4")  # fmt: skip
    assert read_video_header(tmp_path / "clip.mp4").width == 64
    assert count_frames(tmp_path / "clip.mp4", None, None) == 30


@pytest.mark.parametrize("name", ["-i.mp4", "a:b.mp4", "http:x.mp4", "50%03d.mp4", "ein Löwe 'x'.mp4"])
def test_any_name_is_read(tmp_path, thirty, name, monkeypatch):
    (tmp_path / name).write_bytes(thirty.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert count_frames(Path(name), None, None) == 30


def test_pixels_do_not_depend_on_the_number_of_processors(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", detailed(12, 120, 200), "-c:v", "libx264", "-pix_fmt", "yuv420p")
    everywhere = load_clip(path, 2, 7, 64, 96, 20)
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(processors)})
    try:
        assert_array_equal(load_clip(path, 2, 7, 64, 96, 20), everywhere)
    finally:
        os.sched_setaffinity(0, processors)


def children() -> list[int]:
    text = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()
    return [int(number) for number in text.split()]


def test_nothing_is_left_behind(thirty, folder):
    (folder / "text.mp4").write_text("text")
    others, pipes, threads = children(), len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    load_clip(thirty, 0, 5, 480, 640, None)
    count_frames(thirty, None, 3)
    for action in (lambda: load_clip(thirty, 20, 20, 48, 64, None), lambda: read_video_header(folder / "text.mp4")):
        with pytest.raises(DiffSynthError):
            action()
    assert children() == others
    assert len(list(Path("/proc/self/fd").iterdir())) == pipes
    assert threading.active_count() == threads


def test_nothing_is_left_behind_by_an_interrupt(thirty, monkeypatch):
    def interrupt(self, target):
        raise KeyboardInterrupt

    others, threads = children(), threading.active_count()
    monkeypatch.setattr(decoding.Decoding, "read_into", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_clip(thirty, 0, 30, 480, 640, None)
    assert children() == others
    assert threading.active_count() == threads


def test_ffmpeg_reads_no_terminal_and_hears_no_ctrl_c(thirty, monkeypatch):
    started = []
    popen = subprocess.Popen

    def starting(*arguments, **options):
        started.append(options)
        return popen(*arguments, **options)

    monkeypatch.setattr(decoding.subprocess, "Popen", starting)
    load_clip(thirty, 0, 5, 48, 64, None)
    assert [(options["stdin"], options["process_group"]) for options in started] == [(subprocess.DEVNULL, 0)]


def test_threads_may_read_at_once(thirty):
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda start: numbers(load_clip(thirty, start, 3, 48, 64, None)), range(16)))
    assert read == [[start, start + 1, start + 2] for start in range(16)]


def _read(path: Path) -> list[int]:
    return numbers(load_clip(path, 5, 3, 48, 64, None))


def test_worker_processes_may_read(thirty):
    with multiprocessing.get_context("forkserver").Pool(2) as pool:
        assert pool.map(_read, [thirty] * 4) == [[5, 6, 7]] * 4


def test_a_missing_ffmpeg_is_told(thirty, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    with pytest.raises(DiffSynthError, match="cannot start ffmpeg"):
        count_frames(thirty, None, None)

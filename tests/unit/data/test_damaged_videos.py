"""Files that are not videos, truncated or damaged: one clear message each; audio files are rejected."""

import numpy as np
import pytest
from PIL import Image

from diffsynth_core.data.videos import count_frames, load_clip, read_video_header
from diffsynth_core.errors import DiffSynthError
from tests.clips import detailed, ffmpeg, write_clip
from tests.naming import names

pytestmark = pytest.mark.video

FRAMES, HEIGHT, WIDTH = 40, 144, 192
CODINGS = {
    "mp4": ("-c:v", "libx264", "-qp", "12", "-pix_fmt", "yuv420p", "-movflags", "+faststart"),
    "mkv": ("-c:v", "libx264", "-qp", "12", "-pix_fmt", "yuv420p"),
    "webm": ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"),
    "avi": ("-c:v", "mpeg4", "-q:v", "4"),
    "gif": (),
}
HEALTHY = {
    "intra refresh": ("mp4", "-c:v", "libx264", "-x264-params", "intra-refresh=1:keyint=10"),
    "open groups": ("mp4", "-c:v", "libx264", "-x264-params", "open-gop=1:keyint=8:bframes=3"),
    "interlaced": ("mp4", "-c:v", "libx264", "-flags", "+ildct+ilme"),
    "fragments": ("mp4", "-c:v", "libx264", "-movflags", "frag_keyframe+empty_moov"),
    "hevc": ("mp4", "-c:v", "libx265", "-x265-params", "log-level=none"),
    "mjpeg": ("avi", "-c:v", "mjpeg"),
    "vp8": ("webm", "-c:v", "libvpx"),
    "h264 in avi": ("avi", "-c:v", "libx264", "-bf", "0"),
    "prores": ("mov", "-c:v", "prores_ks"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """One valid file of every encoding, by its suffix."""
    folder = tmp_path_factory.mktemp("sound")
    frames = detailed(FRAMES, HEIGHT, WIDTH)
    return {ending: write_clip(folder / f"clip.{ending}", frames, *coding) for ending, coding in CODINGS.items()}


def reasons(path) -> str:
    """Return the messages of the three ways of reading an unreadable file."""
    said = set()
    for read in (read_video_header, lambda path: count_frames(path, None, None), lambda path: load(path, 0, 1)):
        with pytest.raises(DiffSynthError) as caught:
            read(path)
        said.add(str(caught.value).replace(f"`{path}` cannot be read as a video: ", ""))
        assert caught.value.problems[0].hint == names("replace the file")
    (reason,) = said
    return reason


def load(path, start, frames):
    return load_clip(path, start, frames, HEIGHT, WIDTH, None)


NO_VIDEO = names("known video format")


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi"])
def test_a_text_is_no_video(tmp_path, ending):
    (tmp_path / f"clip.{ending}").write_text("once upon a time\n" * 50)
    assert reasons(tmp_path / f"clip.{ending}") == NO_VIDEO


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_an_image_under_a_videos_name_is_no_video(tmp_path, form):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "clip.mp4", format=form)
    assert reasons(tmp_path / "clip.mp4") == NO_VIDEO


def test_a_playlist_opens_no_other_file(tmp_path, sound):
    (tmp_path / "clip.mp4").write_text(f"ffconcat version 1.0\nfile {sound['mp4']}\n")
    assert reasons(tmp_path / "clip.mp4") == NO_VIDEO


def test_an_mp4_without_the_index_at_its_end_is_told(says, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", detailed(20, 96, 128), "-c:v", "libx264", "-pix_fmt", "yuv420p")
    path.write_bytes(path.read_bytes()[:-2000])
    reason = reasons(path)
    says(reason)
    assert reason == names("truncated", "index", "moov atom")


def test_an_empty_file_is_told(says, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"")
    reason = reasons(tmp_path / "clip.mp4")
    says(reason)
    assert reason == names("is empty")


def test_a_file_that_is_not_there_is_told(says, tmp_path):
    reason = reasons(tmp_path / "clip.mp4")
    says(reason)
    assert reason == names("No such file")


@pytest.mark.parametrize("cover", [False, True])
def test_sound_without_images_is_told(tmp_path, cover):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "cover.png")
    image = ("-i", tmp_path / "cover.png", "-map", 0, "-map", 1, "-c:v", "png", "-disposition:v", "attached_pic")
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", *(image if cover else ()), tmp_path / "clip.mp4")
    assert reasons(tmp_path / "clip.mp4") == "no video stream"


@pytest.mark.parametrize(("ending", "options"), [("avi", ()), ("mp4", ("-movflags", "empty_moov"))])
def test_a_video_without_a_frame_is_told(tmp_path, ending, options):
    ffmpeg("-f", "lavfi", "-i", "color=s=64x64", "-frames:v", 0, *options, tmp_path / f"clip.{ending}")
    assert reasons(tmp_path / f"clip.{ending}") in ("no frames", "no video stream")


@pytest.mark.parametrize("name", HEALTHY)
def test_sound_files_of_many_codings_pass(tmp_path, name):
    ending, *coding = HEALTHY[name]
    path = write_clip(tmp_path / f"clip.{ending}", detailed(FRAMES, HEIGHT, WIDTH), "-pix_fmt", "yuv420p", *coding)
    assert count_frames(path, None, None) == FRAMES
    assert load(path, 0, FRAMES).shape == (FRAMES, HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("ending", CODINGS)
def test_a_video_that_is_shorter_than_asked_ends_early(says, sound, ending):
    assert count_frames(sound[ending], None, 2 * FRAMES) == FRAMES
    with pytest.raises(DiffSynthError) as whole:
        load(sound[ending], 0, 49)
    with pytest.raises(DiffSynthError) as later:
        load(sound[ending], 10, 49)
    says([*whole.value.problems, *later.value.problems])
    assert str(whole.value) == names(sound[ending], "ends early", "40 of 49 frames")
    assert str(later.value) == names(sound[ending], "ends early", "30 of 49 frames", "frame 10")


@pytest.mark.parametrize("ending", CODINGS)
def test_a_file_that_is_cut_off_fails_only_where_it_is_missing(tmp_path, sound, ending):
    content = sound[ending].read_bytes()
    path = tmp_path / f"clip.{ending}"
    path.write_bytes(content[: len(content) * 7 // 10])
    assert_damage_is_seen(path, sound[ending])


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi", "gif"])
@pytest.mark.parametrize("seed", range(3))
def test_a_file_with_broken_bytes_fails_only_behind_them(tmp_path, sound, ending, seed):
    content = bytearray(sound[ending].read_bytes())
    generator = np.random.default_rng(seed)
    place = int(len(content) * generator.uniform(0.75, 0.9))
    content[place : place + 3000] = generator.bytes(3000)  # H.264 takes a few hundred for pixels now and then
    path = tmp_path / f"clip.{ending}"
    path.write_bytes(content)
    assert_damage_is_seen(path, sound[ending])


def assert_damage_is_seen(path, sound):
    """Check that counting and loading everything fails, that what loads equals the valid file, and that 3 frames
    load.
    """
    with pytest.raises(DiffSynthError, match=r"(truncated after|damaged at frame) \d+"):
        count_frames(path, None, None)
    with pytest.raises(DiffSynthError, match=r"(truncated after|damaged at frame) \d+"):
        count_frames(path, 12.5, None)
    assert read_video_header(path) is not None
    assert count_frames(path, None, 3) == 3
    whole, failed = load(sound, 0, FRAMES), 0
    for frames in (3, 10, 15, 20, 25, 30, 35, FRAMES):
        try:
            clip = load(path, 0, frames)
        except DiffSynthError:
            failed += 1
        else:
            assert not failed, "a longer clip cannot be sounder"
            np.testing.assert_array_equal(clip, whole[:frames])
    assert 0 < failed < 8


def test_what_counts_does_not_depend_on_chance(tmp_path, sound):
    """The result for a damaged file is the same each time, also for frames right before the damage."""
    content = bytearray(sound["mp4"].read_bytes())
    place = len(content) * 8 // 10
    content[place : place + 50] = bytes(range(50))
    (tmp_path / "clip.mp4").write_bytes(content)
    judged = set()
    for _ in range(4):
        sentences = []
        for limit in range(10, 40, 3):
            try:
                sentences.append(str(count_frames(tmp_path / "clip.mp4", None, limit)))
            except DiffSynthError as error:
                sentences.append(str(error))
        judged.add(tuple(sentences))
    assert len(judged) == 1
    assert {len(sentence) < 4 for sentence in judged.pop()} == {True, False}

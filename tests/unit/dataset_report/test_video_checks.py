"""Findings about videos: facts from real files, and the findings derived from them."""

import hashlib
import io
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from diffsynth_core.data.conditions import Columns
from diffsynth_core.data.images import SizeRule
from diffsynth_core.data.media import FrameRule, MediaRule
from diffsynth_core.data.metadata import Metadata
from diffsynth_core.data.records import Record
from diffsynth_core.data.rows import Rows
from diffsynth_core.data.videos import count_frames
from diffsynth_core.dataset_report.dataset_facts import DatasetFacts
from diffsynth_core.dataset_report.facts import Fault, VideoFacts
from diffsynth_core.dataset_report.image_checks import check_sizes
from diffsynth_core.dataset_report.inspect import Job, inspect_files
from diffsynth_core.dataset_report.rules import Rules
from diffsynth_core.dataset_report.video_checks import check_rates, check_videos
from diffsynth_core.dataset_report.videos import examine_video, mean_rate, spacing
from diffsynth_core.progress import SilentReporter
from tests.clips import detailed, numbered, write_clip
from tests.naming import names
from tests.waiting import alive, wait_until

pytestmark = pytest.mark.video

H264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p")
CODINGS = {
    "clip.mp4": H264,
    "index_first.mp4": (*H264, "-movflags", "+faststart"),
    "clip.mkv": H264,
    "clip.webm": ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"),
    "clip.avi": ("-c:v", "mpeg4", "-q:v", "4"),
    "clip.gif": (),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The folder of one valid file of every encoding: 40 frames at 25 per second, 192 x 144."""
    folder = tmp_path_factory.mktemp("sound")
    for name, coding in CODINGS.items():
        write_clip(folder / name, detailed(40, 144, 192), *coding)
    return folder


@pytest.mark.parametrize("name", CODINGS)
def test_a_sound_video_has_its_facts_and_no_fault(sound, name):
    facts = examine_video(sound, name, None, None)
    assert facts == VideoFacts(
        name,
        (sound / name).stat().st_size,
        width=192,
        height=144,
        frames=40,
        frame_rate=25,
        spacing=facts.spacing,
        digest=hashlib.sha256((sound / name).read_bytes()).hexdigest(),
    )
    assert facts.spacing == pytest.approx((0.04, 0.04), abs=0.0011)


@pytest.mark.parametrize("rate", [8, 12.5, 24, 30, 60])
@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.mkv"])
def test_frames_at_another_rate_are_counted_as_training_counts_them(sound, name, rate):
    facts = examine_video(sound, name, rate, None)
    assert (facts.frames, facts.resampled) == (40, count_frames(sound / name, rate, None))


@pytest.mark.parametrize("name", CODINGS)
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_file_that_lacks_its_end_is_truncated(tmp_path, sound, name, share):
    content = (sound / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    fault = examine_video(tmp_path, name, None, None).fault
    if name == "clip.gif":  # the last frame is half there, which the decoder takes for damage
        assert (fault.code, fault.reason[:17]) == ("VIDEO_UNREADABLE", "damaged at frame ")
    else:
        assert fault.code == "VIDEO_TRUNCATED"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", names("is empty")),
        (b"once upon a time\n" * 50, names("not a known video format")),
        (None, names("No such file")),
    ],
)
def test_what_is_no_video_is_unreadable(says, tmp_path, content, reason):
    if content is not None:
        (tmp_path / "clip.mp4").write_bytes(content)
    fault = examine_video(tmp_path, "clip.mp4", None, None).fault
    says(fault.reason)
    assert fault == Fault("VIDEO_UNREADABLE", reason)


def test_broken_bytes_in_the_middle_are_unreadable(tmp_path, sound):
    content = bytearray((sound / "clip.mkv").read_bytes())
    place = len(content) // 2
    content[place : place + 400] = np.random.default_rng(0).bytes(400)
    (tmp_path / "clip.mkv").write_bytes(content)
    fault = examine_video(tmp_path, "clip.mkv", None, None).fault
    assert fault.code == "VIDEO_UNREADABLE" and fault.reason.startswith("damaged at frame ")


@pytest.mark.parametrize(
    ("times", "variable"),
    [
        ([n / 30 for n in range(60)], False),
        ([round(n / 30, 3) for n in range(60)], False),
        ([round(n / 16, 2) for n in range(60)], False),
        ([round(n / 120, 3) for n in range(60)], False),
        ([n / 30 for n in range(60) if n != 40], True),
        ([n / 24 + (n % 2) / 60 for n in range(60)], True),
        ([n / 30 if n < 30 else 1 + (n - 30) / 15 for n in range(60)], True),
        ([0.0], False),
        ([], False),
    ],
    ids=["even", "milliseconds", "hundredths", "fast", "one lost", "uneven", "slower", "one", "none"],
)
def test_rounded_times_are_even_and_lost_frames_are_not(times, variable):
    assert spacing(tuple(times))[2] is variable


@pytest.mark.parametrize(
    ("claimed", "times", "rate"),
    [
        (29.97, [round(n / 29.97, 3) for n in range(9)], 29.97),
        (16.0, [round(n / 16, 2) for n in range(9)], 16.0),
        (64.0, [n / 16 for n in range(9)], 16.0),
        (1000.0, [n / 29.97 for n in range(9)], 29.97),
        (25.0, [0.0], 25.0),
    ],
)
def test_a_header_that_lies_about_the_rate_is_not_believed(claimed, times, rate):
    assert mean_rate(claimed, tuple(times)) == rate


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_a_variable_rate_is_seen(tmp_path, ending):
    uneven = ("-vf", "setpts='N+floor(N/2)'", "-fps_mode", "passthrough")
    write_clip(tmp_path / f"clip.{ending}", detailed(20, 96, 128), *uneven, *H264)
    facts = examine_video(tmp_path, f"clip.{ending}", None, None)
    assert (facts.variable_rate, facts.frames) == (True, 20)
    assert facts.spacing == pytest.approx((0.04, 0.08), abs=0.001)


@pytest.mark.parametrize(
    ("name", "coding"),
    [
        ("groups.mp4", (*H264, "-x264-params", "open-gop=1:keyint=8:bframes=3")),
        ("clip.mkv", H264),
        ("clip.webm", ("-c:v", "libvpx", "-deadline", "realtime")),
        ("clip.avi", (*H264, "-bf", "0")),
        ("clip.gif", ()),
    ],
)
def test_an_even_rate_that_no_clock_divides_is_even(tmp_path, name, coding):
    write_clip(tmp_path / name, detailed(24, 96, 128), *coding, rate="30000/1001")
    facts = examine_video(tmp_path, name, None, None)
    assert (facts.variable_rate, facts.fault) == (False, None)
    assert facts.frame_rate == pytest.approx(29.97, abs=0.15)


@pytest.mark.parametrize("quality", [18, 40])
@pytest.mark.parametrize("noise", [0, 6])
def test_nothing_moves_whatever_noise_and_coding_do(tmp_path, noise, quality):
    still = np.repeat(detailed(1, 288, 384), 30, axis=0).astype(np.int16)
    noisy = still + np.random.default_rng(0).normal(0, noise, still.shape) if noise else still
    write_clip(tmp_path / "clip.mp4", noisy.clip(0, 255).astype(np.uint8), *H264, "-crf", str(quality), "-g", "10")
    assert examine_video(tmp_path, "clip.mp4", None, None).still


def test_a_small_thing_that_moves_is_seen(tmp_path):
    frames = np.repeat(detailed(1, 288, 384), 30, axis=0)
    for number, frame in enumerate(frames):
        frame[200:216, 20 + 4 * number : 36 + 4 * number] = (230, 40, 40)
    write_clip(tmp_path / "clip.mp4", frames, *H264, "-crf", "32")
    assert not examine_video(tmp_path, "clip.mp4", None, None).still


def test_one_frame_is_not_called_still(tmp_path):
    write_clip(tmp_path / "clip.mp4", detailed(1, 96, 128), *H264)
    facts = examine_video(tmp_path, "clip.mp4", None, None)
    assert (facts.frames, facts.still) == (1, False)


def test_a_rotated_video_is_upright_with_its_thumbnail(tmp_path):
    frames = np.rot90(detailed(6, 96, 128), 1, (1, 2))
    write_clip(tmp_path / "clip.mov", frames, *H264, before=("-noautorotate", "-display_rotation:v", "-90"))
    facts = examine_video(tmp_path, "clip.mov", None, 100)
    assert (facts.rotated, facts.width, facts.height) == (True, 128, 96)
    assert Image.open(io.BytesIO(facts.thumbnail)).size == (100, 75)


@pytest.mark.parametrize("frames", [1, 2, 7, 31, 32, 33, 62])
def test_the_thumbnail_shows_the_middle(tmp_path, frames):
    write_clip(tmp_path / "clip.mkv", numbered(frames))
    facts = examine_video(tmp_path, "clip.mkv", None, 64)
    image = Image.open(io.BytesIO(facts.thumbnail))
    assert image.size == (64, 48)
    shown = image.convert("L").getpixel((32, 24)) / 4
    assert abs(shown - frames // 2) < 3


RECIPE = MediaRule(SizeRule(None, None, 10**6, 16), FrameRule(81, 4, None, "first", 0))
AT_16 = replace(RECIPE, frames=replace(RECIPE.frames, frame_rate=16.0))


def findings(media: MediaRule | None, *videos: VideoFacts) -> list[tuple[str, int | None, str, str | None]]:
    """Return code, row, message and hint of all findings about these videos."""
    columns = Columns("prompt", "video")
    rules = Rules(columns=columns, media=media) if media else Rules(columns=columns)
    records = tuple(Record(row, "x", {"video": (facts.path,)}) for row, facts in enumerate(videos, start=1))
    rows = Rows(Metadata("metadata.csv", Path(), ("video", "prompt"), {}), columns, records)
    dataset = DatasetFacts(rows, rules, videos={facts.path: facts for facts in videos})
    return [
        (one.code, one.row, one.message, one.hint)
        for check in (check_videos, check_rates, check_sizes)
        for one in check(dataset)
    ]


def video(name: str = "a.mp4", **facts) -> VideoFacts:
    return VideoFacts(name, 9, **{"width": 64, "height": 64, "frames": 81, "frame_rate": 16.0, **facts})


@pytest.mark.parametrize("media", [None, RECIPE, AT_16])
def test_nothing_is_said_of_a_sound_video(media):
    assert findings(media, video(resampled=81 if media is AT_16 else None)) == []


@pytest.mark.parametrize(
    ("media", "facts", "code", "message", "hint"),
    [
        (None, {"fault": Fault("VIDEO_TRUNCATED", "it ends")}, "VIDEO_TRUNCATED", names("a.mp4", "it ends"),
         names("download the file")),
        (RECIPE, {"frames": 18}, "VIDEO_TOO_SHORT", names("a.mp4", "18 frames", "expected 81"),
         names("--num_frames 17")),
        (None, {"frames": 1}, "VIDEO_TOO_SHORT", names("a.mp4", "1 frame", "expected 2"), "replace it"),
        (RECIPE, {"frames": 200}, "VIDEO_FRAMES", names("a.mp4", "81 of 200 frames", "119 dropped"), None),
        (AT_16, {"frames": 160, "resampled": 85, "frame_rate": 30.0}, "VIDEO_FRAMES",
         names("a.mp4", "81 of 85 frames", "16 per second", "4 dropped"), None),
        (AT_16, {"resampled": 90, "frame_rate": 12.0}, "VIDEO_FPS",
         names("a.mp4", "12 frames per second", "16 of training"),
         names("--frame_rate")),
        (None, {"frame_rate": 240.0}, "VIDEO_FPS", names("a.mp4", "240 frames per second", "unusual"),
         names("natural speed")),
        (RECIPE, {"variable_rate": True, "spacing": (0.0167, 0.1)}, "VIDEO_VARIABLE_RATE",
         names("a.mp4", "variable", "17 to 100 ms"), names("--frame_rate")),
        (None, {"still": True}, "VIDEO_STILL", names("nothing moves", "a.mp4"),
         names("as an image")),
        (None, {"rotated": True}, "VIDEO_ROTATED", names("a.mp4", "rotation"), None),
    ],
)  # fmt: skip
def test_each_fact_is_told(says, media, facts, code, message, hint):
    found = findings(media, video(**facts))
    says("\n".join(f"{code}: {said}\n  hint: {way}" if way else f"{code}: {said}" for code, _, said, way in found))
    assert (code, 1, message, hint) in found


def test_a_rate_unlike_the_others_is_told_where_the_frames_count_as_they_are():
    clips = [video("a.mp4"), video("b.mp4", frame_rate=16.7), video("c.mp4", frame_rate=30.0, resampled=81)]
    said = [("VIDEO_FPS", 3, names("c.mp4", "30 frames", "16.7"),
             names("--frame_rate"))]  # fmt: skip
    assert findings(RECIPE, *clips) == said
    assert findings(AT_16, *(replace(clip, resampled=81) for clip in clips)) == []


def test_an_even_rate_is_trained_at_whatever_the_times_in_the_file_are():
    assert findings(AT_16, video(variable_rate=True, spacing=(0.01, 0.1), resampled=81)) == []


MARK = f"3600.{os.getpid()}"


@pytest.fixture
def hanging(tmp_path, monkeypatch) -> Path:
    """The folder of a video, and a decoder that never ends."""
    decoder = tmp_path / "decoder"
    decoder.write_text(f"#!/bin/sh\nexec sleep {MARK}\n")
    decoder.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(decoder))
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "clip.mp4").write_text("x")
    return tmp_path / "clips"


def decoders() -> list[psutil.Process]:
    """Return the running hanging decoders."""
    return [process for process in psutil.process_iter(["cmdline"]) if MARK in (process.info["cmdline"] or [])]


def test_no_decoder_is_left_when_a_worker_is_given_up(hanging):
    facts = inspect_files(Job(hanging), {"clip.mp4": "video"}, 1, 1.5, SilentReporter())
    assert facts["clip.mp4"].fault == Fault("VIDEO_UNREADABLE", names("1.5 s", "--file_timeout"))
    assert decoders() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("send", "number"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)], ids=["Ctrl-C", "SIGTERM"]
)
def test_a_signal_leaves_no_decoder_and_no_traceback(hanging, send, number):
    (hanging / "metadata.csv").write_text("video,prompt\nclip.mp4,a clip\n")
    command = [sys.executable, "-m", "diffsynth_cli", "dataset", "validate", str(hanging)]
    validating = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0, text=True)
    wait_until(lambda: alive(validating) and decoders())
    send(validating.pid, number)
    said = validating.communicate(timeout=60)
    assert "Traceback" not in said[1]
    assert (validating.returncode, said[0], decoders()) == (128 + number, "", [])


def test_a_portrait_clip_loses_much_in_a_landscape_recipe():
    """Of 576 x 1024 pixels, 480 x 832 uses 576 x 332."""
    media = replace(RECIPE, size=SizeRule(480, 832, 10**6, 16))
    portrait, landscape = video("tall.mp4", width=576, height=1024), video("wide.mp4", width=1920, height=1080)
    hint = names("--max_crop_loss", "0.2")
    what = names("tall.mp4", "576 x 1024 pixels", "68%", "832 x 480")
    assert findings(media, portrait, landscape) == [("IMAGE_CROP_LOSS", 1, what, hint)]

"""Headers and frame counts: decoded once, correct after every change, and robust against a damaged cache."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from diffsynth_core.data import video_probe_cache as video_memory
from diffsynth_core.data.synthetic_videos import draw_clips
from diffsynth_core.data.video_probe_cache import VideoProbeCache
from diffsynth_core.errors import DiffSynthError


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return draw_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def clip(clips, tmp_path):
    """25 frames at 16 per second."""
    path = tmp_path / "clip.mp4"
    path.write_bytes((clips / "ball.mp4").read_bytes())
    return path


@pytest.fixture
def memory(tmp_path):
    return tmp_path / "cache" / "frames.jsonl"


@pytest.fixture
def decoded(monkeypatch):
    """The requests that were answered by decoding."""
    asked = []
    count = video_memory.count_frames

    def counting(path, frame_rate, limit):
        asked.append((frame_rate, limit))
        return count(path, frame_rate, limit)

    monkeypatch.setattr(video_memory, "count_frames", counting)
    return asked


def test_a_count_is_right_and_remembered_by_the_next_instance(memory, clip, decoded):
    assert [VideoProbeCache(memory).count(clip, None, None) for _ in range(3)] == [25, 25, 25]
    assert decoded == [(None, None)]


@pytest.mark.parametrize(
    ("questions", "answers", "times"),
    [
        ([10, 5, 10], [10, 5, 10], 1),
        ([5, 10], [5, 10], 2),
        ([10, None, 99], [10, 25, 25], 2),
        ([99, None, 10], [25, 25, 10], 1),
        ([25, 26, 27], [25, 25, 25], 2),
        ([None, 3], [25, 3], 1),
    ],
)
def test_a_higher_limit_is_counted_only_when_the_end_was_not_reached(memory, clip, decoded, questions, answers, times):
    assert [VideoProbeCache(memory).count(clip, None, limit) for limit in questions] == answers
    assert len(decoded) == times


def test_frame_rates_are_counted_apart(memory, clip, decoded):
    counts = VideoProbeCache(memory)
    assert [counts.count(clip, rate, None) for rate in (None, 8, 8.0, 32)] == [25, 13, 13, 50]
    assert VideoProbeCache(memory).count(clip, 8, None) == 13
    assert [rate for rate, _ in decoded] == [None, 8, 32]


def test_a_changed_file_is_counted_again(memory, clip, clips):
    counts = VideoProbeCache(memory)
    assert counts.count(clip, None, None) == 25
    clip.write_bytes((clips / "coin.webm").read_bytes())
    assert counts.count(clip, None, None) == VideoProbeCache(memory).count(clip, None, None) == 7


def test_a_change_of_the_same_size_under_the_old_time_is_seen(memory, clip, decoded):
    counts = VideoProbeCache(memory)
    counts.count(clip, None, None)
    before = clip.stat()
    clip.write_bytes(clip.read_bytes())
    os.utime(clip, ns=(before.st_atime_ns, before.st_mtime_ns))
    counts.count(clip, None, None)
    assert len(decoded) == 2


def test_a_new_way_of_decoding_counts_again(memory, clip, decoded, monkeypatch):
    VideoProbeCache(memory).count(clip, None, None)
    monkeypatch.setattr(video_memory, "VIDEO_TRANSFORM", video_memory.VIDEO_TRANSFORM + 1)
    VideoProbeCache(memory).count(clip, None, None)
    assert len(decoded) == 2


@pytest.mark.parametrize("rest", ['{"path": "/x", "sta', "{", "\0\0\0\0", '{"path": "/x"}', "[1]", "7", "null"])
def test_a_torn_line_is_passed_over(memory, clip, clips, decoded, rest):
    VideoProbeCache(memory).count(clip, None, None)
    with memory.open("a") as stream:
        stream.write(rest)
    VideoProbeCache(memory).count(clips / "kite.mkv", None, None)
    counts = VideoProbeCache(memory)
    assert (counts.count(clip, None, None), counts.count(clips / "kite.mkv", None, None)) == (25, 17)
    assert len(decoded) == 2


@pytest.mark.parametrize("field", ["stamp", "path", "question", "answer"])
def test_a_line_without_a_field_is_passed_over(memory, clip, decoded, field):
    VideoProbeCache(memory).count(clip, None, None)
    entry = json.loads(memory.read_text())
    del entry[field]
    memory.write_text(json.dumps(entry) + "\n")
    assert VideoProbeCache(memory).count(clip, None, None) == 25
    assert len(decoded) == 2


def test_a_memory_that_is_no_text_means_counting(memory, clip):
    memory.parent.mkdir()
    memory.write_bytes(b"\xff\xfe\x00broken\n")
    assert VideoProbeCache(memory).count(clip, None, None) == 25


def test_a_memory_that_cannot_be_written_only_means_counting_again(tmp_path, clip, decoded):
    (tmp_path / "file").write_text("")
    counts = VideoProbeCache(tmp_path / "file" / "frames.jsonl")
    assert [counts.count(clip, None, None), counts.count(clip, None, None)] == [25, 25]
    assert len(decoded) == 1
    assert VideoProbeCache(tmp_path / "file" / "frames.jsonl").count(clip, None, None) == 25
    assert len(decoded) == 2


def test_threads_decode_each_file_once(memory, clip, clips, decoded):
    paths = [clip, clips / "kite.mkv", clips / "coin.webm"] * 8
    counts, threads = VideoProbeCache(memory), threading.active_count()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda path: counts.count(path, None, None), paths)) == [25, 17, 7] * 8
    assert len(decoded) == 3
    assert len(memory.read_text().splitlines()) == 3
    assert threading.active_count() == threads


def test_a_file_that_fails_is_not_remembered(memory, tmp_path, clips):
    path = tmp_path / "clip.mp4"
    path.write_text("no video")
    counts = VideoProbeCache(memory)
    with pytest.raises(DiffSynthError, match="cannot be read as a video"):
        counts.count(path, None, None)
    assert not memory.exists()
    with pytest.raises(DiffSynthError, match="No such file"):
        counts.count(tmp_path / "none.mp4", None, None)


def test_a_header_is_read_once_and_after_every_change(memory, clip, clips, monkeypatch):
    read = []
    real = video_memory.read_video_header
    monkeypatch.setattr(video_memory, "read_video_header", lambda path: read.append(path) or real(path))
    headers = [VideoProbeCache(memory).header(clip) for _ in range(3)]
    assert headers == [real(clip)] * 3 and len(read) == 1
    assert VideoProbeCache(memory).count(clip, None, None) == 25
    clip.write_bytes((clips / "coin.webm").read_bytes())
    assert VideoProbeCache(memory).header(clip) == real(clip) != headers[0]
    assert len(read) == 2

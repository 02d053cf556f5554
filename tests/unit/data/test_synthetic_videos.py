"""The clips of rehearsals: readable, moving, upright, and identical each time."""

import csv
import itertools

import numpy as np
import pytest

from diffsynth_core.data.synthetic_videos import DRAWN, draw_clips
from diffsynth_core.data.videos import count_frames, load_clip, read_video_header


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw_clips(tmp_path_factory.mktemp("clips") / "new")


@pytest.mark.parametrize("drawn", DRAWN, ids=[drawn[0] for drawn in DRAWN])
def test_every_clip_has_its_size_and_frames_and_moves(folder, drawn):
    name, (width, height), frames, *_ = drawn
    header = read_video_header(folder / name)
    assert (header.width, header.height, header.rotated) == (width, height, "turned" in name)
    assert count_frames(folder / name, None, None) == frames
    clip = load_clip(folder / name, 0, frames, height, width, None).astype(int)
    assert all(abs(after - before).max() > 60 for before, after in itertools.pairwise(clip))


def test_a_turned_clip_is_upright(folder):
    first = load_clip(folder / "lift_turned.mov", 0, 1, 192, 128, None)[0].astype(int)
    rows, columns = np.nonzero(first.sum(axis=-1) > 200)
    assert abs(rows.mean() - 96) < 3, "the shape starts half way down"
    assert abs(columns.mean() - 25) < 3, "and at the left"


def test_the_metadata_names_every_clip(folder):
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["video"] for row in rows] == [drawn[0] for drawn in DRAWN]
    assert len({len(row["prompt"]) for row in rows}) == len(rows)
    assert {name.name for name in folder.iterdir()} == {"metadata.csv", *(row["video"] for row in rows)}


def test_containers_differ_and_one_clip_is_short():
    assert {drawn[0].rpartition(".")[2] for drawn in DRAWN} == {"mp4", "mov", "mkv", "webm", "gif"}
    assert sorted(drawn[2] for drawn in DRAWN)[:2] == [7, 17]


def test_drawing_again_gives_the_same_bytes(folder, tmp_path):
    again = draw_clips(tmp_path)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_what_exists_is_left(tmp_path):
    (tmp_path / "ball.mp4").write_bytes(b"mine")
    (tmp_path / "metadata.csv").write_text("video,prompt\n")
    draw_clips(tmp_path)
    assert (tmp_path / "ball.mp4").read_bytes() == b"mine"
    assert (tmp_path / "metadata.csv").read_text() == "video,prompt\n"
    assert (tmp_path / "coin.webm").is_file()

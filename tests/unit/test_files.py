"""Atomic writes, and folders of one run."""

import os
import resource
from pathlib import Path

import pytest

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.files import (
    atomic_write,
    default_cache_path,
    make_numbered_folder,
    model_base_path,
    write_json,
    write_text,
)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("deep", ["a.txt", "new/folder/a.txt"])
def test_a_file_appears_under_its_name_when_the_block_ends(tmp_path, deep):
    path = tmp_path / deep
    with atomic_write(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == path.parent  # the same volume, so that renaming is one step
        number = temporary.stat().st_ino
    assert path.read_text() == "whole"
    assert path.stat().st_ino == number  # renamed, not copied
    assert names(path.parent) == ["a.txt"]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3), DiffSynthError("x")])
@pytest.mark.parametrize("existed", [False, True])
def test_an_exception_leaves_neither_name(tmp_path, error, existed):
    path = tmp_path / "a.txt"
    if existed:
        path.write_text("old")
    with pytest.raises(type(error)), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error
    assert names(tmp_path) == (["a.txt"] if existed else [])
    assert not existed or path.read_text() == "old"


def test_a_block_that_writes_nothing_is_told_and_leaves_nothing(tmp_path):
    with (
        pytest.raises(DiffSynthError, match=r"cannot write `.*a\.txt`: No such file"),
        atomic_write(tmp_path / "a.txt"),
    ):
        pass
    assert names(tmp_path) == []


def test_a_full_disk_leaves_nothing_and_is_one_clear_error(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DiffSynthError, match=r"cannot write `.*a\.txt`: File too large") as caught:
            write_text(tmp_path / "a.txt", "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.problems[0].hint == "free some space or choose another folder"
    assert names(tmp_path) == []


def test_a_folder_in_the_way_is_told(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(DiffSynthError, match=r"cannot write `.*a\.txt`"):
        write_text(tmp_path / "a.txt", "x")
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("below", ["a.txt", "deeper/a.txt"])
def test_a_file_in_place_of_the_folder_is_told(tmp_path, below):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiffSynthError, match="cannot write"):
        write_text(tmp_path / "file" / below, "x")
    assert (tmp_path / "file").read_text() == "x"


def test_the_longest_file_name_can_be_written(tmp_path):
    name = "n" * 200 + ".txt"
    write_text(tmp_path / name, "x")
    assert names(tmp_path) == [name]


def test_two_writers_of_one_name_do_not_meet(tmp_path):
    with atomic_write(tmp_path / "a") as first, atomic_write(tmp_path / "a") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a").read_text() == "first"
    assert names(tmp_path) == ["a"]


def test_text_and_json_are_utf8(tmp_path):
    write_text(tmp_path / "a.txt", "ä\n€")
    write_json(tmp_path / "a.json", {"ü": [1, None], "b": 0.1})
    assert (tmp_path / "a.txt").read_bytes() == "ä\n€".encode()
    assert (tmp_path / "a.json").read_bytes() == '{\n  "ü": [\n    1,\n    null\n  ],\n  "b": 0.1\n}\n'.encode()


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    assert (tmp_path / "a.json").read_text() == "1\n"


def test_a_fresh_folder_is_the_first_that_is_not_there(tmp_path):
    parent = tmp_path / "rehearsals"
    made = [make_numbered_folder(parent, lambda number: f"run-{number}") for _ in range(3)]
    assert made == [parent / "run-1", parent / "run-2", parent / "run-3"]
    made[1].rmdir()
    assert make_numbered_folder(parent, lambda number: f"run-{number}") == parent / "run-2"


def test_a_fresh_folder_passes_over_files_too(tmp_path):
    (tmp_path / "run-1").write_text("x")
    assert make_numbered_folder(tmp_path, lambda number: f"run-{number}") == tmp_path / "run-2"


@pytest.mark.timeout(20)
def test_a_file_in_place_of_the_parent_of_a_fresh_folder_is_told(tmp_path):
    (tmp_path / "rehearsals").write_text("x")
    with pytest.raises(DiffSynthError, match="rehearsals"):
        make_numbered_folder(tmp_path / "rehearsals", lambda number: f"run-{number}")


@pytest.mark.parametrize(
    ("variable", "value", "function", "expected"),
    [
        ("XDG_CACHE_HOME", "/x", default_cache_path, "/x/diffsynth"),
        ("XDG_CACHE_HOME", "", default_cache_path, "/home/someone/.cache/diffsynth"),
        ("XDG_CACHE_HOME", None, default_cache_path, "/home/someone/.cache/diffsynth"),
        ("DIFFSYNTH_MODEL_BASE_PATH", "/m", model_base_path, "/m"),
        ("DIFFSYNTH_MODEL_BASE_PATH", "", model_base_path, "models"),
        ("DIFFSYNTH_MODEL_BASE_PATH", None, model_base_path, "models"),
    ],
)
def test_folders_come_from_the_environment(monkeypatch, variable, value, function, expected):
    monkeypatch.setenv("HOME", "/home/someone")
    if value is None:
        monkeypatch.delenv(variable, raising=False)
    else:
        monkeypatch.setenv(variable, value)
    assert function() == Path(expected)


def test_importing_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_path() == tmp_path / "diffsynth"
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - the names alone

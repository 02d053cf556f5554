"""Measurements that are remembered on disk."""

import json

import pytest

from diffsynth_core.models import activation_cache
from diffsynth_core.models.activation_cache import FILE, StepActivations, remembered

MEASURED = StepActivations(5, 4, 3, 2, 1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "diffsynth"


def never():
    raise AssertionError("measured again")


def test_what_was_measured_once_is_not_measured_again(folder):
    assert remembered({"of": 1}, StepActivations, lambda: MEASURED) == MEASURED
    assert remembered({"of": 2}, int, lambda: 7) == 7
    assert remembered({"of": 1}, StepActivations, never) == MEASURED
    assert remembered({"of": 2}, int, never) == 7


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1', "\x00"])
def test_a_damaged_file_is_written_again(folder, text):
    folder.mkdir(parents=True)
    (folder / FILE).write_text(text, encoding="utf-8")
    assert remembered({"of": 1}, int, lambda: 7) == 7
    assert list(json.loads((folder / FILE).read_text(encoding="utf-8")).values()) == [7]


def test_an_answer_of_another_kind_is_measured_again(folder):
    remembered({"of": 1}, int, lambda: 7)
    assert remembered({"of": 1}, StepActivations, lambda: MEASURED) == MEASURED


def test_another_version_of_a_library_is_measured_again(folder, monkeypatch):
    remembered({"of": 1}, int, lambda: 7)
    monkeypatch.setattr(activation_cache, "_versions", lambda: {"torch": "99"})
    assert remembered({"of": 1}, int, lambda: 8) == 8


def test_where_nothing_can_be_written_all_is_measured(folder):
    folder.parent.joinpath("diffsynth").write_text("a file in the folder's place", encoding="utf-8")
    assert remembered({"of": 1}, int, lambda: 7) == 7
    assert remembered({"of": 1}, int, lambda: 8) == 8

"""Damaged JSON: each kind of fault is one message with the file and the position."""

import json
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.json_files import (
    MAX_DEPTH,
    InvalidJson,
    UnreadableFile,
    WrongType,
    as_type,
    parse_json,
    read_json,
    read_json_lines,
)
from tests.naming import names

HINT = "fetch it again"


@dataclass(frozen=True)
class Entry:
    file: str
    bytes: int


@dataclass(frozen=True)
class Record:
    status: Literal["running", "completed"]
    step: int
    rate: float = 0.1
    note: str | None = None
    checkpoints: tuple[Entry, ...] = ()
    shape: tuple[int, int] = (1, 1)
    settings: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)


@pytest.fixture
def fault(says):
    """What is said of a file that cannot be read."""

    def find(path, kind=dict[str, Any], **limit):
        with pytest.raises(UnreadableFile) as caught:
            read_json(path, kind, HINT, **limit)
        (problem,) = caught.value.problems
        assert problem.hint == HINT
        assert str(path) in problem.message
        told = problem.message.replace(str(path), "FILE")
        says(told)
        return told

    return find


BROKEN = {
    "empty": (b"", names("line 1", "column 1", "is empty")),
    "truncated": (b'{\n  "step": 7,\n  "st', names("line 3", "column 3", "Unterminated")),
    "zeros": (b"\0" * 20, names("line 1, column 1")),
    "two values": (b"{} {}", names("line 1, column 4", "Extra")),
    "NaN": (b'{"loss": NaN}', names("NaN")),
    "infinite": (b'{"loss": -Infinity}', names("-Infinity")),
    "overflow": (b'{"loss": 1e999}', names("1e999", "too large")),
    "digits": (b'{"step": ' + b"9" * 5000 + b"}", names("too many digits")),
    "twice": (b'{"step": 1, "step": 2}', names("duplicate", "step")),
    "deep list": (b"[" * 100_000, names("nested too deeply")),
    "deep object": (b'{"a":' * 100_000, names("nested too deeply")),
    "deeper than read": (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), names("nested too deeply")),
}


@pytest.mark.parametrize("content, message", BROKEN.values(), ids=BROKEN)
def test_what_is_not_json_is_told_with_its_place(fault, tmp_path, content, message):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    assert fault(path) == names("FILE", "not valid JSON", message)


def test_what_is_not_utf8_or_too_large_is_told(fault, tmp_path):
    path = tmp_path / "run.json"
    path.write_bytes(b'{"a": "\xff"}')
    assert fault(path) == names("FILE", "not UTF-8", "byte 7")
    path.write_text('{"a": "aaaaaaaaaaaa"}')
    assert fault(path, limit=20) == names("FILE", "21 bytes", "limit", 20)
    assert read_json(path, dict[str, str], HINT, limit=21) == {"a": "aaaaaaaaaaaa"}


def test_what_stands_in_the_place_of_a_file_is_told(fault, tmp_path):
    path = tmp_path / "run.json"
    assert fault(path) == names("FILE", "missing")
    path.mkdir()
    assert fault(path) == names("FILE", "a folder", "a file")
    path.rmdir()
    os.mkfifo(path)  # opening it would block
    assert fault(path) == names("FILE", "regular file")
    path.unlink()
    path.symlink_to(path)
    assert fault(path) == names("cannot read", "FILE", "Too many levels")
    assert fault(tmp_path / ("n" * 300)) == names("cannot read", "FILE", "too long")
    assert fault(tmp_path / "a\0b") == names("cannot read", "FILE", "null byte")
    assert fault(path.with_name("text") / "run.json") == names("FILE", "missing")


def test_a_mark_of_byte_order_is_passed_over(tmp_path):
    path = tmp_path / "run.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path, dict[str, Any], HINT) == {"a": 1}


def test_nesting_up_to_the_limit_is_read():
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(text) == json.loads(text)
    assert parse_json("[" + "[]," * 1000 + "[]]") == [[]] * 1001
    with pytest.raises(InvalidJson, match="nested too deeply"):
        parse_json(f"[{text}]")


def test_tables_may_hold_nan():
    assert parse_json("[NaN, 1e999]", finite=False)[0] != 0
    assert parse_json("[NaN]", finite=False)[0] != parse_json("[NaN]", finite=False)[0]


def test_values_become_what_is_asked_for():
    value = {
        "status": "running",
        "step": 7,
        "rate": 1,
        "checkpoints": [{"file": "a", "bytes": 1}],
        "shape": [2, 3],
        "settings": {"a": [None]},
        "flags": {"on": True},
    }
    record = as_type(value, Record)
    assert record == Record("running", 7, 1.0, None, (Entry("a", 1),), (2, 3), {"a": [None]}, {"on": True})
    assert type(record.rate) is float
    assert as_type({"status": "completed", "step": 0, "note": "\udcff"}, Record).note == "\udcff"
    assert as_type([1, [2]], list[Any]) == [1, [2]]


WRONG = {
    "top": ([1], names("a list", "an object")),
    "scalar": (3, names(3, "an object")),
    "integer": ({"step": "7"}, names("step", '"7"', "an integer")),
    "boolean": ({"step": True}, names("step", "true", "an integer")),
    "fraction": ({"step": 1.5}, names("step", "1.5", "an integer")),
    "number": ({"rate": "fast"}, names("rate", '"fast"', "a number")),
    "large": ({"rate": 10**400}, names("rate", f"{'1' + '0' * 39}…", "smaller")),
    "union": ({"note": 5}, names("note", 5, "a string")),
    "literal": ({"status": "done"}, names("status", '"done"', '"running"', '"completed"')),
    "list": ({"checkpoints": {}}, names("checkpoints", "an object", "a list")),
    "length": ({"shape": [1, 2, 3]}, names("shape", "a list of 2")),
    "item": ({"shape": [1, None]}, names("shape[1]", "null", "an integer")),
    "nested": (
        {"checkpoints": [{"file": "a", "bytes": 1}, {"file": "b", "bytes": "1"}]},
        names("checkpoints[1].bytes", '"1"', "an integer"),
    ),
    "entry": ({"checkpoints": ["a"]}, names("checkpoints[0]", '"a"', "an object")),
    "value": ({"flags": {"a": 0}}, names("flags.a", 0, "true or false")),
    "lacking": ({"checkpoints": [{}]}, names("file", "bytes", "missing", "checkpoints[0]")),
    "unknown": ({"steps": 3}, names("unknown key", "steps")),
    "long": ({"step": "x" * 1000}, names("step", f'"{"x" * 39}…', "an integer")),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_a_wrong_type_is_told_with_its_place(fault, tmp_path, change, message):
    path = tmp_path / "run.json"
    value = {"status": "running", "step": 7} | change if isinstance(change, dict) else change
    path.write_text(json.dumps(value))
    assert fault(path, Record) == names("FILE", message)
    with pytest.raises(WrongType):
        as_type(value, Record)


def test_a_key_without_default_must_be_there():
    with pytest.raises(WrongType, match=r"^`step` is missing$"):
        as_type({"status": "running"}, Record)


def test_of_a_memory_the_damaged_lines_are_passed_over(tmp_path):
    path = tmp_path / "identities.jsonl"
    assert list(read_json_lines(path)) == []
    path.write_bytes(b'{"a": 1}\n[2]\n{"b"\n\xff\n' + b"[" * 100_000 + b'\n\n{"c": NaN}\n{"d": 4}')
    assert list(read_json_lines(path)) == [{"a": 1}, {"d": 4}]
    assert list(read_json_lines(path, limit=5)) == []
    path.unlink()
    path.mkdir()
    assert list(read_json_lines(path)) == []


def test_an_unreadable_file_is_an_error_for_the_user():
    assert issubclass(UnreadableFile, DiffSynthError)

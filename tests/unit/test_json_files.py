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

HINT = "fetch the file again"


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


def fault(path, kind=dict[str, Any], **limit):
    with pytest.raises(UnreadableFile) as caught:
        read_json(path, kind, HINT, **limit)
    (problem,) = caught.value.problems
    assert problem.hint == HINT
    assert str(path) in problem.message
    return problem.message.replace(str(path), "FILE")


BROKEN = {
    "empty": (b"", "line 1, column 1: it is empty"),
    "cut short": (b'{\n  "step": 7,\n  "st', "line 3, column 3: Unterminated string starting at"),
    "zeros": (b"\0" * 20, "line 1, column 1: Expecting value"),
    "two values": (b"{} {}", "line 1, column 4: Extra data"),
    "NaN": (b'{"loss": NaN}', "NaN is not a valid JSON number"),
    "infinite": (b'{"loss": -Infinity}', "-Infinity is not a valid JSON number"),
    "overflow": (b'{"loss": 1e999}', "the number 1e999 is too large"),
    "digits": (b'{"step": ' + b"9" * 5000 + b"}", "a number has too many digits"),
    "twice": (b'{"step": 1, "step": 2}', "duplicate key `step` in an object"),
    "deep list": (b"[" * 100_000, "it is nested too deeply"),
    "deep object": (b'{"a":' * 100_000, "it is nested too deeply"),
    "deeper than read": (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "it is nested too deeply"),
}


@pytest.mark.parametrize("content, message", BROKEN.values(), ids=BROKEN)
def test_what_is_not_json_is_told_with_its_place(tmp_path, content, message):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    assert fault(path) == f"`FILE` is not valid JSON: {message}"


def test_what_is_not_utf8_or_too_large_is_told(tmp_path):
    path = tmp_path / "run.json"
    path.write_bytes(b'{"a": "\xff"}')
    assert fault(path) == "`FILE` is not UTF-8 (byte 7)"
    path.write_text('{"a": "aaaaaaaaaaaa"}')
    assert fault(path, limit=20) == "`FILE` has 21 bytes, the limit is 20"
    assert read_json(path, dict[str, str], HINT, limit=21) == {"a": "aaaaaaaaaaaa"}


def test_what_stands_in_the_place_of_a_file_is_told(tmp_path):
    path = tmp_path / "run.json"
    assert fault(path) == "`FILE` is missing"
    path.mkdir()
    assert fault(path) == "`FILE` is a folder, expected a file"
    path.rmdir()
    os.mkfifo(path)  # opening it would block
    assert fault(path) == "`FILE` is not a regular file"
    path.unlink()
    path.symlink_to(path)
    assert fault(path) == "cannot read `FILE`: Too many levels of symbolic links"
    assert fault(tmp_path / ("n" * 300)) == "cannot read `FILE`: File name too long"
    assert fault(tmp_path / "a\0b") == "cannot read `FILE`: embedded null byte"
    assert fault(path.with_name("text") / "run.json") == "`FILE` is missing"


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
    "top": ([1], "the top level is a list, expected an object"),
    "scalar": (3, "the top level is `3`, expected an object"),
    "integer": ({"step": "7"}, '`step` is `"7"`, expected an integer'),
    "boolean": ({"step": True}, "`step` is `true`, expected an integer"),
    "fraction": ({"step": 1.5}, "`step` is `1.5`, expected an integer"),
    "number": ({"rate": "fast"}, '`rate` is `"fast"`, expected a number'),
    "large": ({"rate": 10**400}, f"`rate` is `{'1' + '0' * 39}…`, expected a smaller number"),
    "union": ({"note": 5}, "`note` is `5`, expected a string"),
    "literal": ({"status": "done"}, '`status` is `"done"`, expected "running" or "completed"'),
    "list": ({"checkpoints": {}}, "`checkpoints` is an object, expected a list"),
    "length": ({"shape": [1, 2, 3]}, "`shape` is a list, expected a list of 2"),
    "item": ({"shape": [1, None]}, "`shape[1]` is `null`, expected an integer"),
    "nested": (
        {"checkpoints": [{"file": "a", "bytes": 1}, {"file": "b", "bytes": "1"}]},
        '`checkpoints[1].bytes` is `"1"`, expected an integer',
    ),
    "entry": ({"checkpoints": ["a"]}, '`checkpoints[0]` is `"a"`, expected an object'),
    "value": ({"flags": {"a": 0}}, "`flags.a` is `0`, expected true or false"),
    "lacking": ({"checkpoints": [{}]}, "`file`, `bytes` are missing in `checkpoints[0]`"),
    "unknown": ({"steps": 3}, "unknown key `steps`"),
    "long": ({"step": "x" * 1000}, f'`step` is `"{"x" * 39}…`, expected an integer'),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_a_wrong_type_is_told_with_its_place(tmp_path, change, message):
    path = tmp_path / "run.json"
    value = {"status": "running", "step": 7} | change if isinstance(change, dict) else change
    path.write_text(json.dumps(value))
    assert fault(path, Record) == f"`FILE`: {message}"
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

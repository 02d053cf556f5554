"""YAML as users write it: YAML 1.2 numbers, duplicate keys reported, and no file that causes a traceback."""

import math
import time
from pathlib import Path

import pytest

from diffsynth_core.config.yaml_files import read_yaml
from diffsynth_core.errors import DiffSynthError
from tests.naming import names


@pytest.fixture
def read(tmp_path):
    def read(content):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_yaml(path)

    return read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("+1e3", 1e3),
        ("-3e-2", -0.03),
        ("1e05", 1e5),
        (".5", 0.5),
        ("-.5e1", -5.0),
        ("5.", 5.0),
        ("5.e-1", 0.5),
        ("1.5e+3", 1500.0),
        ("0.0001", 0.0001),
        ("1.0", 1.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
    ],
)
def test_floats(read, text, value):
    for content in (f"a: {text}", f"a: [{text}]", f"{{a: {text}}}", f"a: {text} # a comment"):
        found = read(content)["a"]
        found = found[0] if isinstance(found, list) else found
        assert type(found) is float
        assert found == value


def test_not_a_number_is_a_float(read):
    assert math.isnan(read("a: .nan")["a"])


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("32", 32), ("-7", -7), ("+7", 7), ("010", 10), ("1000000", 10**6)]
)
def test_integers_stay_integers(read, text, value):
    found = read(f"a: {text}")["a"]
    assert type(found) is int and found == value


@pytest.mark.parametrize(
    "text",
    [
        "1e",
        "e5",
        "1e-4x",
        "1.2.3",
        "step-1e4",
        "1e-",
        "e",
        ".",
        "+.",
        "1e4.5",
        "'1e-4'",
        '"5."',
        "a.5",
        "1 e4",
        "nan",
        "inf",
    ],
)
def test_what_only_looks_like_a_number_stays_text(read, text):
    assert read(f"a: {text}")["a"] == text.strip("'\"")


@pytest.mark.parametrize("text", ["2026-08-01", "2026-08-01 12:00:00", "2026-02-30", "12:30", "1:30.5"])
def test_dates_and_times_stay_text(read, text):
    assert read(f"output_path: {text}") == {"output_path": text}


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("sft", "sft")]
)
def test_other_words(read, text, value):
    assert read(f"a: {text}")["a"] is value or read(f"a: {text}")["a"] == value


@pytest.mark.parametrize("content", ["", "# nothing\n", "---\n", b"\xef\xbb\xbf", "\n\n"])
def test_an_empty_file_is_an_empty_mapping(read, content):
    assert read(content) == {}


def test_a_byte_order_mark_and_windows_lines_do_not_matter(read):
    assert read(b"\xef\xbb\xbfparameters:\r\n  lora_rank: 16\r\n") == {"parameters": {"lora_rank": 16}}


@pytest.mark.parametrize(
    ("content", "line", "key"),
    [
        ("a: 1\na: 2\n", 2, "a"),
        ("parameters:\n  lora_rank: 8\n  seed: 1\n  lora_rank: 16\n", 4, "lora_rank"),
        ("{a: 1, 'a': 2}\n", 1, "a"),
        ("b:\n  - a: 1\n    a: 1\n", 3, "a"),
    ],
)
def test_a_repeated_key_is_told_with_its_line(says, read, content, line, key):
    with pytest.raises(DiffSynthError) as caught:
        read(content)
    says(caught.value.problems)
    assert str(caught.value) == names("not valid YAML", f"line {line}", "duplicate", key)
    assert "recipe.yaml" in str(caught.value)


def test_the_same_key_in_different_places_is_no_repetition(read):
    assert read("a: {x: 1}\nb: {x: 2, a: 3}\n") == {"a": {"x": 1}, "b": {"x": 2, "a": 3}}


def test_merged_values_may_be_given_anew(read):
    assert read("a: &a {x: 1, y: 1}\nb: {<<: *a, x: 2}\n")["b"] == {"x": 2, "y": 1}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("a: [1, 2\nb: 3\n", 2),
        ("a: 'x\n", 2),
        ("a: 1\n b: 2\n", 2),
        ("a: *nobody\n", 1),
        ("a: !!python/name:os.system\n", 1),
        ("a:\n\t- b\n", 2),
    ],
)
def test_what_is_no_yaml_is_told_with_its_line(says, read, content, line):
    with pytest.raises(DiffSynthError) as caught:
        read(content)
    says(caught.value.problems)
    assert str(caught.value) == names("not valid YAML", f"line {line}") and "recipe.yaml" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "a: \x07\n",
        "a: 1\x00\n",
        "? [a, b]\n: 1\n",
        "? {a: 1}\n: 1\n",
        "a: !!int x\n",
        "--- {a: 1}\n--- {a: 2}\n",
        b"a: \xff\n",
        "a: 1".encode("utf-16"),
    ],
    ids=["control", "NUL", "list as key", "mapping as key", "forced integer", "two documents", "latin-1", "UTF-16"],
)  # fmt: skip
def test_no_file_ends_in_a_traceback(read, content):
    with pytest.raises(DiffSynthError, match=r"recipe\.yaml"):
        read(content)


@pytest.mark.parametrize(
    ("content", "kind"),
    [("- a\n- b\n", "a list"), ("just text\n", "a string"), ("3\n", "an integer"), ("false\n", "a boolean")],
)
def test_something_else_than_a_mapping_is_told(says, read, content, kind):
    with pytest.raises(DiffSynthError) as caught:
        read(content)
    says(caught.value.problems)
    assert str(caught.value) == names(kind, "expected keys") and "recipe.yaml" in str(caught.value)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()], ids=["nothing", "a folder"])
def test_a_file_that_cannot_be_read_is_told(says, tmp_path, make):
    make(tmp_path / "gone.yaml")
    with pytest.raises(DiffSynthError) as caught:
        read_yaml(tmp_path / "gone.yaml")
    says(caught.value.problems)
    assert str(caught.value) == names("cannot read", tmp_path / "gone.yaml")


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
LONG = "x" * 20_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, names("line 4", "more than", "10000 keys")),
        (BOMB.replace("[", "{k: [").replace("]", "]}"), names("line 4", "more than", "10000 keys")),
        (f"a: &a {LONG}\nb: [{'*a, ' * 100}]", names("line 2", "more than", "10000 keys")),
        ("[" * 100_000, names("line 1", "nested too deeply")),
        ("{" * 100_000, names("line 1", "nested too deeply")),
        ("- " * 100_000, names("line 1", "nested too deeply")),
        ("a: &a [*a]", names("line 1", "*a", "itself")),
        ("a: &a {b: [1, *a]}", names("line 1", "*a", "itself")),
        ("a: [" + "x, " * 20_000 + "]", names("line 1", "more than", "10000 keys")),
        ("seed: " + "9" * 5000, names("line 1", f"{'9' * 40}…", "too many digits")),
        ("a: !!bool maybe", names("maybe")),
        ("a: !!int x", names("x")),
        ("a: !!float x", names("could not convert")),
        ("a: !!timestamp 2001-99-99", names("1..12")),
    ],
    ids=[
        "aliases",
        "nested_aliases",
        "long_text",
        "brackets",
        "braces",
        "dashes",
        "cycle",
        "deep_cycle",
        "long_list",
        "digits",
        "bool",
        "int",
        "float",
        "time",
    ],
)
def test_what_would_cost_is_refused_at_once(says, read, content, message):
    started = time.process_time()
    with pytest.raises(DiffSynthError, match="is not valid YAML") as caught:
        read(content)
    says(caught.value.problems)
    assert str(caught.value) == message
    assert time.process_time() - started < 2, "minutes, without the limits"


def test_a_file_that_is_too_large_is_not_read(says, read):
    with pytest.raises(DiffSynthError) as caught:
        read("a: 1 #" + "x" * 300_000)
    says(caught.value.problems)
    assert str(caught.value) == names("262144 bytes")


def test_aliases_that_stay_small_are_read(read):
    assert read("a: &a [1, 2]\nb: *a\nc: {<<: &m {d: 1}, e: *m}") == {
        "a": [1, 2],
        "b": [1, 2],
        "c": {"d": 1, "e": {"d": 1}},
    }


def test_a_name_with_a_nul_is_no_file():
    with pytest.raises(DiffSynthError, match="embedded null byte"):
        read_yaml(Path("a\0b.yaml"))

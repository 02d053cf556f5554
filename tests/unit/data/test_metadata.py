"""Real-world metadata: three formats, captions next to images, and every way a file can be broken."""

import json

import pytest

from diffsynth_core.data.conditions import Columns
from diffsynth_core.data.images import SizeRule
from diffsynth_core.data.media import MediaRule
from diffsynth_core.data.metadata import find_metadata, read_metadata
from diffsynth_core.data.rows import read_rows
from diffsynth_core.data.samples import build_samples
from diffsynth_core.data.video_probe_cache import VideoProbeCache
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.progress import SilentReporter
from tests.naming import names

ROWS = [{"image": "a.png", "prompt": "a cat"}, {"image": "b.png", "prompt": 'a "dog", two\nlines — ä'}]
CSV = 'image,prompt\na.png,a cat\nb.png,"a ""dog"", two\nlines — ä"\n'
CONTENTS = {
    "metadata.csv": CSV,
    "metadata.json": json.dumps(ROWS, ensure_ascii=False, indent=2),
    "metadata.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n",
}


def read(folder, name, content):
    """Write `content` (text or bytes) as a metadata file and read it."""
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return read_metadata(folder, None if name in CONTENTS else folder / name, "prompt", "image")


def caption_of(folder, name, content):
    """Return the caption of the first sample."""
    from PIL import Image

    Image.new("RGB", (32, 32)).save(folder / "a.png")
    rule = MediaRule(SizeRule(None, None, 1 << 20, 16))
    counts = VideoProbeCache(folder / "frames")
    rows = read_rows(read(folder, name, content), Columns("prompt", "image"), "named")
    found, problems = build_samples(rows, rule, counts, SilentReporter())
    assert not rows.problems() and not problems
    return found.samples[0].caption


def errors(metadata):
    """What training refuses of the metadata, before any cell is read."""
    return [one for one in metadata.findings if one.level == "error"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("name", CONTENTS)
def test_all_formats_give_the_same_rows(tmp_path, name, mark):
    metadata = read(tmp_path, name, mark + CONTENTS[name].encode())
    assert [dict(row) for row in metadata.rows.values()] == ROWS
    assert metadata.columns == ("image", "prompt")
    assert metadata.origin == str(tmp_path / name)


@pytest.mark.parametrize("name", CONTENTS)
def test_windows_line_ends_and_capital_endings_are_read(tmp_path, name):
    content = (
        '[{"image": "a.png",\r\n"prompt": "x"}]\r\n'
        if name.endswith(".json")
        else '{"image": "a.png", "prompt": "x"}\r\n\r\n'
    )
    content = "image,prompt\r\na.png,x\r\n\r\n" if name.endswith(".csv") else content
    metadata = read(tmp_path, name.replace("metadata", "Other").upper(), content)
    assert [dict(row) for row in metadata.rows.values()] == [{"image": "a.png", "prompt": "x"}]


def test_csv_comes_before_json_and_a_given_file_before_both(tmp_path):
    for name, content in CONTENTS.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert find_metadata(tmp_path, None) == tmp_path / "metadata.csv"
    assert find_metadata(tmp_path, tmp_path / "other.csv") == tmp_path / "other.csv"
    (tmp_path / "metadata.csv").unlink()
    assert find_metadata(tmp_path, None) == tmp_path / "metadata.json"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "image,prompt\na.png,\n"),
        ("metadata.csv", "image,prompt\na.png\n"),
        ("metadata.json", '[{"image": "a.png", "prompt": ""}]'),
        ("metadata.json", '[{"image": "a.png", "prompt": null}]'),
        ("metadata.jsonl", '{"image": "a.png", "prompt": null}'),
        ("metadata.jsonl", '{"image": "a.png"}\n{"image": "a.png", "prompt": "x"}'),
    ],
)
def test_a_missing_caption_is_an_empty_one(tmp_path, name, content):
    assert caption_of(tmp_path, name, content) == ""


@pytest.mark.parametrize("caption", ["nano", "No one", "0", " both ends ", "a\tb"])
def test_captions_stay_as_they_stand(tmp_path, caption):
    assert caption_of(tmp_path, "metadata.csv", f"image,prompt\na.png,{caption}\n") == caption


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_only_a_newline_ends_a_line_of_jsonl(tmp_path, separator):
    caption = f"one{separator}two"
    content = json.dumps({"image": "a.png", "prompt": caption}, ensure_ascii=False)
    assert separator in content
    assert read(tmp_path, "metadata.jsonl", content + "\n").rows[1]["prompt"] == caption


def test_a_csv_row_may_be_short_and_blank_lines_count_for_nothing(tmp_path):
    metadata = read(tmp_path, "metadata.csv", " image , prompt ,extra\na.png,x\n\nb.png,y,z\n\n")
    assert [dict(row) for row in metadata.rows.values()] == [
        {"image": "a.png", "prompt": "x"},
        {"image": "b.png", "prompt": "y", "extra": "z"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("metadata.csv", "image,prompt\na.png,x\nb.png,one, two\n", names("line 3", "3 cells", "header", 2)),
        ("metadata.csv", "image,prompt\na.png," + "x" * 200_000 + "\n", names("line 2", "field larger")),
        ("metadata.csv", "image,prompt\n", names("no rows")),
        ("metadata.csv", "", names("no rows")),
        ("metadata.json", "", names("line 1")),
        ("metadata.json", "[]", names("no rows")),
        ("metadata.jsonl", "\n \n", names("no rows")),
        ("metadata.json", '[\n{"image": "a.png"},\n{"image" "b"}\n]', names("line 3", "Expecting")),
        ("metadata.json", '{"image": "a.png"}', names("an object", "a list")),
        ("metadata.json", '[{"image": "a.png"}, "b.png"]', names("row 2", "a string", "an object")),
        ("metadata.jsonl", '{"image": "a"}\n\n{"image": }\n', names("line 3", "Expecting value")),
        ("metadata.jsonl", '{"image": "a"}\n[1]\n', names("row 2", "a list", "an object")),
    ],
)
def test_a_broken_file_says_where(says, tmp_path, name, content, expected):
    (error,) = errors(read(tmp_path, name, content))
    says([error])
    assert error.message == names(tmp_path / name, expected)
    assert error.hint and error.path == name


def test_a_file_of_another_kind_is_refused(says, tmp_path):
    with pytest.raises(DiffSynthError) as caught:
        read(tmp_path, "other.txt", "image,prompt\na.png,x\n")
    says(caught.value.problems)
    assert str(caught.value) == names(tmp_path / "other.txt", ".csv", ".json", ".jsonl")


def test_a_quote_that_never_closes_swallows_no_row_in_silence(tmp_path):
    (error,) = errors(read(tmp_path, "metadata.csv", 'image,prompt\na.png,"a cat\nb.png,a dog\nc.png,a bird\n'))
    assert "metadata.csv` line 2: unterminated cell" in error.message and error.row is None


def test_two_columns_of_one_name_are_refused(tmp_path):
    (error,) = errors(read(tmp_path, "metadata.csv", "image,prompt,prompt\na.png,one,two\n"))
    assert "the column `prompt` twice" in error.message and error.row is None


def test_every_line_that_cannot_be_read_is_told_and_the_others_are_read(tmp_path):
    content = '{"image": "a.png"}\n{"image": }\n[1]\n{"image": "b.png"}\n'
    metadata = read(tmp_path, "metadata.jsonl", content)
    assert [(one.row, one.code) for one in metadata.findings] == [(2, "PARSE_ERROR"), (3, "PARSE_ERROR")]
    assert metadata.rows == {1: {"image": "a.png"}, 4: {"image": "b.png"}}


@pytest.mark.parametrize("position", [40, 9_000, 20_000])
@pytest.mark.parametrize("name", CONTENTS)
def test_a_byte_that_is_not_utf8_is_told_by_its_place_in_the_file(tmp_path, name, position):
    lead = {
        "metadata.csv": b"image,prompt\na.png,",
        "metadata.json": b'[{"image": "',
        "metadata.jsonl": b'{"image": "',
    }[name]
    content = lead.ljust(position, b"x") + b"\xff" + b"y" * 50
    (error,) = errors(read(tmp_path, name, content))
    assert f"is not UTF-8 (byte {position})" in error.message


def test_a_folder_or_file_that_is_not_there_is_named(says, tmp_path):
    with pytest.raises(DiffSynthError) as folder:
        read_metadata(tmp_path / "gone", None, "prompt", "image")
    with pytest.raises(DiffSynthError) as file:
        read_metadata(tmp_path, tmp_path / "gone.csv", "prompt", "image")
    says([*folder.value.problems, *file.value.problems])
    assert str(folder.value) == names(tmp_path / "gone", "dataset_base_path", "does not exist")
    assert str(file.value) == names(tmp_path / "gone.csv", "does not exist")


def test_captions_beside_the_images_are_the_rows(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.PNG", "a.jpg", "sub/c.webp", "notes.md"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.txt").write_text("\ufeffa cat \n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("", encoding="utf-8")
    (tmp_path / "sub" / "c.txt").write_text("two\nlines", encoding="utf-8")
    metadata = read_metadata(tmp_path, None, "prompt", "image")
    assert [(row["image"], row["prompt"]) for row in metadata.rows.values()] == [
        ("a.jpg", "a cat"),
        ("b.PNG", ""),
        ("sub/c.webp", "two\nlines"),
    ]
    assert metadata.columns == ("image", "prompt")


def test_images_without_caption_are_named(says, tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    metadata = read_metadata(tmp_path, None, "prompt", "image")
    says(errors(metadata))
    assert [(one.row, one.message) for one in errors(metadata)] == [
        (2, names("b.png", "no caption", "b.txt")),
        (3, names("c.png", "no caption", "c.txt")),
    ]
    rows = read_rows(metadata, Columns("prompt", "image"), "named")
    assert rows.faulty == {2, 3}
    assert rows.problems()[0].message == f"`{tmp_path}`: {errors(metadata)[0].message}"


def test_a_caption_file_that_is_not_utf8_is_named(says, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (error,) = errors(read_metadata(tmp_path, None, "prompt", "image"))
    says([error])
    assert error.message == names("a.txt", "not UTF-8", "byte 3")


def test_a_folder_with_neither_metadata_nor_images_says_what_is_expected(says, tmp_path):
    (error,) = errors(read_metadata(tmp_path, None, "prompt", "image"))
    says([error])
    assert error.hint == names("image", "prompt")
    assert error.message == names(tmp_path, "metadata.csv, metadata.json, metadata.jsonl")


def test_two_files_that_share_a_caption_are_told(says, tmp_path):
    for name in ("a.mp4", "a.png", "a.txt"):
        (tmp_path / name).write_text("x")
    (error,) = errors(read_metadata(tmp_path, None, "prompt", "video", "video"))
    says([error])
    assert error.message == names("a.mp4", "a.png", "a.txt")


def test_a_folder_with_an_ending_is_no_file_and_lone_captions_are_told(tmp_path):
    (tmp_path / "x.mp4").mkdir()
    for name in ("a.mp4", "a.txt", "b.txt"):
        (tmp_path / name).write_text("x")
    metadata = read_metadata(tmp_path, None, "prompt", "video", "video")
    assert [row["video"] for row in metadata.rows.values()] == ["a.mp4"]
    assert metadata.notes == (names("1 caption", "b.txt", "no image"),)

"""Identical messages of `dataset validate` and `train` about datasets made in spreadsheets and editors."""

import json

import pytest

from diffsynth_core.data.metadata import read_metadata
from tests.naming import names

LONG = "a cat on a chair, " * 60


@pytest.fixture
def validate(cli, says, dataset):
    """Check the dataset; return (code, message, hint) of its errors."""

    def run(*arguments):
        outcome = cli("dataset", "validate", dataset, "--depth", "paths", "--format", "json", *arguments)
        findings = json.loads(outcome.out)["findings"]
        errors = [(one["code"], one["message"], one["hint"]) for one in findings if one["level"] == "error"]
        says("\n".join(f"{code} {message}\n  hint: {hint}" for code, message, hint in errors))
        return errors

    return run


@pytest.mark.parametrize(
    ("separator", "name"), [(";", "semicolons"), ("\t", "tabs"), ('";"', "semicolons"), ("|", "bars")]
)
def test_other_marks_than_commas_between_columns(validate, refuse, dataset, separator, name):
    rows = [("image", "prompt"), ("coffee.png", "a cup, white"), ("rocket.png", "a rocket")]
    quote = '"' if '"' in separator else ""
    lines = [f"{quote}{separator.join(row)}{quote}\r\n" for row in rows]
    (dataset / "metadata.csv").write_text("".join(lines), encoding="utf-8-sig", newline="")
    message = names(f"{dataset}/metadata.csv", name, "expected commas")
    assert validate() == [("PARSE_ERROR", message, names("commas"))]
    assert refuse() == (1, [(message, names("commas"))])


def test_no_line_with_the_names_of_the_columns(validate, refuse, dataset):
    (dataset / "metadata.csv").write_text("coffee.png,a cup\nrocket.png,a rocket\n")
    hint = names("header", "image,prompt")
    found = [(names(f"{dataset}/metadata.csv", "no column", name, "coffee.png", "a cup"), hint)
             for name in ("image", "prompt")]  # fmt: skip
    assert validate() == [("COLUMN_MISSING", *one) for one in found]
    assert refuse() == (1, found)


@pytest.mark.parametrize(
    ("text", "fault", "hint"),
    [
        ('image,prompt\ncoffee.png,"a cup\nrocket.png,b\n', names("line 2", "unterminated"),
         names("close the quote")),
        ('image,prompt\na.png,b\ncoffee.png,"a" cup\n', names("line 3", "',' expected after '\"'"),
         names("double the quotes")),
    ],
)  # fmt: skip
def test_quotes_that_do_not_fit(validate, refuse, dataset, text, fault, hint):
    path = dataset / "metadata.csv"
    path.write_text(text)
    assert ("PARSE_ERROR", names(path, fault, "nothing after it"), hint) in validate()
    assert (names(path, fault, "nothing after it"), hint) in refuse()[1]


def test_utf_16_without_a_mark(validate, refuse, dataset):
    path = dataset / "metadata.csv"
    path.write_bytes("image,prompt\ncoffee.png,a\n".encode("utf-16-le"))
    assert validate() == [("NOT_UTF8", names(path, "line 1", "not UTF-8", "byte 1", "UTF-16"), "save it as UTF-8")]
    assert refuse() == (1, [(names(path, "line 1", "not UTF-8", "byte 1", "UTF-16"), "save it as UTF-8")])


def test_rows_without_columns(validate, refuse, dataset):
    (dataset / "metadata.csv").unlink()
    (dataset / "metadata.json").write_text("[{}, {}]")
    found = [
        (names(f"{dataset}/metadata.json", "no column", name, "no columns"), "add the column")
        for name in ("image", "prompt")
    ]
    assert [one for one in validate() if one[0] == "COLUMN_MISSING"] == [("COLUMN_MISSING", *one) for one in found]
    assert refuse() == (1, found)


def test_columns_of_other_programs(validate, refuse, dataset):
    (dataset / "metadata.csv").write_text("file_name,text\ncoffee.png,a\n")
    has, there = names(f"{dataset}/metadata.csv", "no column"), names("file_name", "text")
    found = [
        (names(has, "image", there), names("rename", "file_name")),
        (names(has, "prompt", there), names("rename", "text")),
    ]
    assert validate() == [("COLUMN_MISSING", *one) for one in found]
    assert refuse() == (1, found)


def test_captions_beside_images_that_are_to_be_edited(validate, refuse, dataset):
    (dataset / "metadata.csv").unlink()
    for path in dataset.glob("*.png"):
        path.with_suffix(".txt").write_text(path.stem)
    message = names(f"{dataset} (captions in text files)", "no column", "edit_image")
    hint = names("metadata.csv", "image", "edit_image", "prompt")
    recipe = "qwen-image-edit-lora"
    assert validate("--recipe", recipe) == [("COLUMN_MISSING", message, hint)]
    code, problems = refuse(recipe=recipe)
    assert code == 1 and (message, hint) in problems


@pytest.mark.parametrize(
    ("named", "hint"),
    [
        ("no.png", None),  # its ending alone makes it look like others
        ("cofee.jpg", names("coffee.png")),
        ("chelsae.png", None),  # another row has chelsea.png
    ],
)
def test_a_file_that_may_be_meant(validate, dataset, named, hint):
    (dataset / "metadata.csv").write_text(f"image,prompt\nchelsea.png,a\n{named},b\n")
    assert validate() == [
        ("PATH_MISSING", names("row 2", "image", named, "does not exist"), hint or names("relative to", dataset))
    ]


def test_no_color_leaves_no_codes(cli, dataset, monkeypatch):
    (dataset / "metadata.csv").write_text("image,prompt\nno.png,a\n")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b" in cli("dataset", "validate", dataset, "--depth", "paths").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in cli("dataset", "validate", dataset, "--depth", "paths").out


def test_captions_where_paths_belong_do_not_fill_the_terminal(cli, validate, refuse, dataset):
    (dataset / "metadata.csv").write_text(f'image,prompt\n"{LONG}",coffee.png\n')
    shown = names("row 1", "image", f"{LONG[:200]}…", "does not exist")
    assert validate() == [("PATH_MISSING", shown, names("file name", "caption"))]
    assert all(len(message) < 400 for message, _ in refuse(hide=(r"(a cat on a chair, )+a.*?…",))[1])
    (dataset / "metadata.csv").write_text(f'"{LONG}","{LONG} too",seed\n')
    assert all(len(message) < 400 for _, message, _ in validate())
    assert len(cli("dataset", "validate", dataset, "--depth", "paths").out) < 3000


def test_a_caption_for_a_path_does_not_fill_the_page(cli, dataset, tmp_path):
    (dataset / "metadata.csv").write_text(f'image,prompt\n"{LONG}",coffee.png\n')
    page = tmp_path / "page.html"
    assert cli("dataset", "validate", dataset, "--depth", "paths", "--report", page).code == 1
    assert LONG[:200] in page.read_text() and LONG[:400] not in page.read_text()


def test_metadata_that_is_not_read(says, cli, dataset):
    (dataset / "metadata.jsonl").write_text("")
    told = names(dataset, "metadata.jsonl", "not read", "metadata.csv")
    outcome = cli("dataset", "validate", dataset, "--depth", "paths", "--format", "json")
    (finding,) = json.loads(outcome.out)["findings"]
    assert (outcome.code, finding["code"], finding["message"]) == (0, "METADATA_UNUSED", told)
    assert finding["message"] in read_metadata(dataset, None, "prompt", "image").notes
    says(finding["message"])
    chosen = ("--dataset_metadata_path", dataset / "metadata.csv")
    named = cli("dataset", "validate", dataset, *chosen, "--depth", "paths", "--format", "json")
    assert (named.code, json.loads(named.out)["findings"]) == (0, [])
    (dataset / "metadata.csv").unlink()
    (dataset / "metadata.jsonl").unlink()
    (dataset / "metadata.parquet").write_bytes(b"PAR1")
    outcome = cli("dataset", "validate", dataset, "--depth", "paths", "--format", "json")
    messages = {one["code"]: (one["message"], one["hint"]) for one in json.loads(outcome.out)["findings"]}
    expected = names("metadata.csv", "metadata.json", "metadata.jsonl")
    says("\n  hint: ".join(messages["METADATA_UNUSED"]))
    assert messages["METADATA_UNUSED"] == (
        names(dataset, "metadata.parquet", "not read", expected),
        names("export", "metadata.csv"),
    )

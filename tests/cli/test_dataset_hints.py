"""Identical messages of `dataset validate` and `train` about datasets made in spreadsheets and editors."""

import json

import pytest

from diffsynth_core.data.metadata import read_metadata

LONG = "a cat on a chair, " * 60


@pytest.fixture
def validate(cli, dataset):
    """Check the dataset; return (code, message, hint) of its errors."""

    def run(*arguments):
        outcome = cli("dataset", "validate", dataset, "--depth", "paths", "--format", "json", *arguments)
        findings = json.loads(outcome.out)["findings"]
        return [(one["code"], one["message"], one["hint"]) for one in findings if one["level"] == "error"]

    return run


@pytest.mark.parametrize(
    ("separator", "name"), [(";", "semicolons"), ("\t", "tabs"), ('";"', "semicolons"), ("|", "bars")]
)
def test_other_marks_than_commas_between_columns(validate, refuse, dataset, separator, name):
    rows = [("image", "prompt"), ("coffee.png", "a cup, white"), ("rocket.png", "a rocket")]
    quote = '"' if '"' in separator else ""
    lines = [f"{quote}{separator.join(row)}{quote}\r\n" for row in rows]
    (dataset / "metadata.csv").write_text("".join(lines), encoding="utf-8-sig", newline="")
    message = f"`{dataset}/metadata.csv` separates its columns with {name}, expected commas"
    assert validate() == [("PARSE_ERROR", message, "re-export it with commas")]
    assert refuse() == (1, [(message, "re-export it with commas")])


def test_no_line_with_the_names_of_the_columns(validate, refuse, dataset):
    (dataset / "metadata.csv").write_text("coffee.png,a cup\nrocket.png,a rocket\n")
    hint = "add a header line `image,prompt`"
    found = [(f"`{dataset}/metadata.csv` has no column `{name}`; it has `coffee.png`, `a cup`", hint)
             for name in ("image", "prompt")]  # fmt: skip
    assert validate() == [("COLUMN_MISSING", *one) for one in found]
    assert refuse() == (1, found)


@pytest.mark.parametrize(
    ("text", "fault", "hint"),
    [
        ('image,prompt\ncoffee.png,"a cup\nrocket.png,b\n', "line 2: unterminated cell (unexpected end of data)",
         "close the quote opened there"),
        ('image,prompt\na.png,b\ncoffee.png,"a" cup\n', "line 3: ',' expected after '\"'",
         "double the quotes inside a cell, and close the quotes around it"),
    ],
)  # fmt: skip
def test_quotes_that_do_not_fit(validate, refuse, dataset, text, fault, hint):
    path = dataset / "metadata.csv"
    path.write_text(text)
    assert ("PARSE_ERROR", f"`{path}` {fault}; nothing after it was read", hint) in validate()
    assert refuse() == (1, [(f"`{path}` {fault}", hint)])


def test_utf_16_without_a_mark(validate, refuse, dataset):
    path = dataset / "metadata.csv"
    path.write_bytes("image,prompt\ncoffee.png,a\n".encode("utf-16-le"))
    assert validate() == [
        ("NOT_UTF8", f"`{path}` line 1 is not UTF-8 (byte 1): it looks like UTF-16", "save it as UTF-8")
    ]
    assert refuse() == (1, [(f"`{path}` is not UTF-8 (byte 1): it looks like UTF-16", "save it as UTF-8")])


def test_columns_of_other_programs(validate, refuse, dataset):
    (dataset / "metadata.csv").write_text("file_name,text\ncoffee.png,a\n")
    has = f"`{dataset}/metadata.csv` has no column"
    there = "it has `file_name`, `text`"
    found = [(f"{has} `image`; {there}", "rename `file_name`"), (f"{has} `prompt`; {there}", "rename `text`")]
    assert validate() == [("COLUMN_MISSING", *one) for one in found]
    assert refuse() == (1, found)


def test_captions_beside_images_that_are_to_be_edited(validate, refuse, dataset):
    (dataset / "metadata.csv").unlink()
    for path in dataset.glob("*.png"):
        path.with_suffix(".txt").write_text(path.stem)
    message = f"`{dataset} (captions in text files)` has no column `edit_image`, which requires a metadata file"
    hint = "write a metadata.csv with the columns `image`, `edit_image`, `prompt`"
    recipe = "qwen-image-edit-lora"
    assert validate("--recipe", recipe) == [("COLUMN_MISSING", message, hint)]
    code, problems = refuse(recipe=recipe)
    assert code == 1 and (message, hint) in problems


@pytest.mark.parametrize(
    ("named", "hint"),
    [
        ("no.png", None),  # its ending alone makes it look like others
        ("cofee.jpg", "did you mean `coffee.png`?"),
        ("chelsae.png", None),  # another row has chelsea.png
    ],
)
def test_a_file_that_may_be_meant(validate, dataset, named, hint):
    (dataset / "metadata.csv").write_text(f"image,prompt\nchelsea.png,a\n{named},b\n")
    assert validate() == [
        (
            "PATH_MISSING",
            f"row 2: column `image` names `{named}`, which does not exist",
            hint or f"correct the path (relative to `{dataset}`)",
        )
    ]


def test_no_colour_leaves_no_codes(cli, dataset, monkeypatch):
    (dataset / "metadata.csv").write_text("image,prompt\nno.png,a\n")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b" in cli("dataset", "validate", dataset, "--depth", "paths").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in cli("dataset", "validate", dataset, "--depth", "paths").out


def test_captions_where_paths_belong_do_not_fill_the_terminal(cli, validate, refuse, dataset):
    (dataset / "metadata.csv").write_text(f'image,prompt\n"{LONG}",coffee.png\n')
    shown = f"row 1: column `image` names `{LONG[:200]}…`, which does not exist"
    assert validate() == [("PATH_MISSING", shown, "write a file name here: this looks like a caption")]
    assert all(len(message) < 400 for message, _ in refuse()[1])
    (dataset / "metadata.csv").write_text(f'"{LONG}","{LONG} too",seed\n')
    assert all(len(message) < 400 for _, message, _ in validate())
    assert len(cli("dataset", "validate", dataset, "--depth", "paths").out) < 3000


def test_a_caption_for_a_path_does_not_fill_the_page(cli, dataset, tmp_path):
    (dataset / "metadata.csv").write_text(f'image,prompt\n"{LONG}",coffee.png\n')
    page = tmp_path / "page.html"
    assert cli("dataset", "validate", dataset, "--depth", "paths", "--report", page).code == 1
    assert LONG[:200] in page.read_text() and LONG[:400] not in page.read_text()


def test_metadata_that_is_not_read(cli, dataset):
    (dataset / "metadata.jsonl").write_text("")
    told = f"`{dataset}` contains `metadata.jsonl`, which is not read because `metadata.csv` exists"
    outcome = cli("dataset", "validate", dataset, "--depth", "paths", "--format", "json")
    (finding,) = json.loads(outcome.out)["findings"]
    assert (outcome.code, finding["code"], finding["message"]) == (0, "METADATA_UNUSED", told)
    assert told in read_metadata(dataset, None, "prompt", "image").notes
    (dataset / "metadata.csv").unlink()
    (dataset / "metadata.jsonl").unlink()
    (dataset / "metadata.parquet").write_bytes(b"PAR1")
    outcome = cli("dataset", "validate", dataset, "--depth", "paths", "--format", "json")
    messages = {one["code"]: (one["message"], one["hint"]) for one in json.loads(outcome.out)["findings"]}
    expected = "expected metadata.csv, metadata.json, metadata.jsonl"
    assert messages["METADATA_UNUSED"] == (
        f"`{dataset}` contains `metadata.parquet`, which is not read: {expected}",
        "export it as metadata.csv",
    )

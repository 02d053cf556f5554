"""What `dataset validate` and `train` say, in the same words, of datasets made by hand in spreadsheets and editors."""

import json

import pytest

LONG = "a cat on a chair, " * 60


@pytest.fixture
def validate(cli, dataset):
    """Check the dataset; the (code, message, hint) of its errors."""

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
    message = f"`{dataset}/metadata.csv` has {name} between its columns, expected commas"
    assert validate() == [("PARSE_ERROR", message, "export it again, with commas")]
    assert refuse() == (1, [(message, "export it again, with commas")])


def test_no_line_with_the_names_of_the_columns(validate, refuse, dataset):
    (dataset / "metadata.csv").write_text("coffee.png,a cup\nrocket.png,a rocket\n")
    hint = "name the columns in the first line, `image,prompt`"
    found = [(f"`{dataset}/metadata.csv` has no column `{name}`; it has `coffee.png`, `a cup`", hint)
             for name in ("image", "prompt")]  # fmt: skip
    assert validate() == [("COLUMN_MISSING", *one) for one in found]
    assert refuse() == (1, found)


def test_captions_beside_pictures_that_are_to_be_edited(validate, refuse, dataset):
    (dataset / "metadata.csv").unlink()
    for path in dataset.glob("*.png"):
        path.with_suffix(".txt").write_text(path.stem)
    message = f"`{dataset} (captions beside the files)` has no column `edit_image`, which only a metadata file can have"
    hint = "write a metadata.csv with the columns `image`, `edit_image`, `prompt`"
    recipe = "qwen-image-edit-lora"
    assert validate("--recipe", recipe) == [("COLUMN_MISSING", message, hint)]
    code, problems = refuse(recipe=recipe)
    assert code == 1 and (message, hint) in problems


@pytest.mark.parametrize(
    ("named", "hint"),
    [
        ("no.png", "correct the path"),  # its ending alone makes it look like others
        ("cofee.jpg", "did you mean `coffee.png`?"),
        ("chelsae.png", "correct the path"),  # another row has chelsea.png
    ],
)
def test_a_file_that_may_be_meant(validate, dataset, named, hint):
    (dataset / "metadata.csv").write_text(f"image,prompt\nchelsea.png,a\n{named},b\n")
    assert validate() == [("PATH_MISSING", f"row 2: column `image` names `{named}`, which is not there", hint)]


def test_no_colour_leaves_no_codes(cli, dataset, monkeypatch):
    (dataset / "metadata.csv").write_text("image,prompt\nno.png,a\n")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b" in cli("dataset", "validate", dataset, "--depth", "paths").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in cli("dataset", "validate", dataset, "--depth", "paths").out


def test_captions_where_paths_belong_do_not_fill_the_terminal(cli, validate, refuse, dataset):
    (dataset / "metadata.csv").write_text(f'image,prompt\n"{LONG}",coffee.png\n')
    shown = f"row 1: column `image` names `{LONG[:200]}…`, which is not there"
    assert validate() == [("PATH_MISSING", shown, "name a file here: this reads as a caption")]
    assert all(len(message) < 400 for message, _ in refuse()[1])
    (dataset / "metadata.csv").write_text(f'"{LONG}","{LONG} too",seed\n')
    assert all(len(message) < 400 for _, message, _ in validate())
    assert len(cli("dataset", "validate", dataset, "--depth", "paths").out) < 3000

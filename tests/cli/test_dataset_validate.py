"""`diffsynth dataset validate`: the table, `--fix`, JSON, and the checks before training."""

import csv
import json
import subprocess
import sys

import pytest

from tests.naming import names

PATHS = names("relative")
FAULTY = "image,prompt,note\nchelsea.png,a cat,x\nno.png,none there,x\n/etc/a.png,outside,x\n"


def test_the_table(says, cli, dataset):
    (dataset / "metadata.csv").write_text(FAULTY + "".join(f"missing{number}.png,m{number},\n" for number in range(6)))
    outcome = cli("dataset", "validate", dataset, "--depth", "metadata")
    assert outcome.code == 0
    outcome = cli("dataset", "validate", dataset, "--depth", "paths")
    lines = [line.rstrip() for line in outcome.out.splitlines()]
    assert outcome.code == 1
    assert "\x1b" not in outcome.out and any(len(line) > 80 for line in lines)  # whole where stdout is no terminal
    assert lines[:3] == [
        "error PATH_MISSING (7)",
        names("listed file"),
        names("2 column", "image", "no.png", "does not exist"),
    ]
    says(outcome)
    assert "        and 2 more" in lines
    assert lines.index("error PATH_OUTSIDE (1)") < lines.index("warning COLUMN_UNKNOWN (1)")
    assert lines[-2:] == ["8 errors, 4 warnings, 0 infos", names("exit code 1")]


def test_the_table_is_as_wide_as_the_terminal(cli, dataset, monkeypatch):
    monkeypatch.setattr("diffsynth_cli.text.wrapping.terminal_width", lambda: 40)
    (dataset / "metadata.csv").write_text(FAULTY)
    lines = cli("dataset", "validate", dataset, "--depth", "paths").out.splitlines()
    assert max(map(len, lines)) <= 40
    begin = lines.index("      2 column `image` names `no.png`, ")
    assert lines[begin + 1].startswith("        which")


def test_what_could_steer_the_terminal_is_spelled_out(cli, dataset):
    (dataset / "metadata.csv").write_text("image,prompt\n\x1b[31mred.png,[bold]a[/bold]\n")
    outcome = cli("dataset", "validate", dataset, "--depth", "paths")
    assert "\\u001b[31mred.png" in outcome.out and "\x1b" not in outcome.out


def test_a_set_without_errors(cli, dataset):
    outcome = cli("dataset", "validate", dataset, "--workers", 1, "--recipe", "qwen-image-lora", "--batch-size", 3,
                  "--min-area-share", 0)  # fmt: skip
    assert outcome.code == 0
    assert "batch size 3" in outcome.out and "error " not in outcome.out and "warning " not in outcome.out
    assert outcome.out.splitlines()[-1] == names("exit code 0")


def test_the_count_of_images_keeps_its_first_key_in_json(cli, dataset):
    summary = json.loads(cli("dataset", "validate", dataset, "--workers", 1, "--format", "json").out)["summary"]
    assert summary["pictures"] == summary["images"] == 4


def test_an_unpaired_surrogate_in_json(cli, dataset):
    (dataset / "metadata.csv").unlink()
    (dataset / "metadata.json").write_text(json.dumps([{"image": "\ud83d.png", "prompt": "a"}]))
    outcome = cli("dataset", "validate", dataset, "--depth", "paths", "--format", "json")
    report = json.loads(outcome.out)
    assert (outcome.code, report["findings"][0]["code"], report["summary"]["errors"]) == (1, "PATH_MISSING", 1)
    assert "\\ud83d.png" in cli("dataset", "validate", dataset, "--depth", "paths").out


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream))


def test_fix_keeps_rows_without_errors(says, cli, dataset):
    (dataset / "metadata.csv").write_text(FAULTY)
    before = (dataset / "metadata.csv").read_bytes()
    out = dataset / "whole.csv"
    outcome = cli("dataset", "validate", dataset, "--depth", "paths", "--fix", out)
    assert (outcome.code, read_csv(out)) == (1, [["image", "prompt", "note"], ["chelsea.png", "a cat", "x"]])
    assert outcome.err == names(out, "1 row", "2 rows removed")
    says(outcome.err)
    assert f"`--dataset_base_path {dataset} --dataset_metadata_path {out}`" in outcome.err
    assert (dataset / "metadata.csv").read_bytes() == before
    assert cli("dataset", "validate", out, "--depth", "paths").code == 0


def test_fix_of_json_lines_and_of_captions_beside(says, cli, dataset, tmp_path):
    (dataset / "metadata.csv").unlink()
    rows = [
        {"image": "chelsea.png", "prompt": 'a "cat",\nand more', "seed": 3, "edit_image": ["coffee.png", "rocket.png"]},
        {"image": "no.png", "prompt": "b", "other": None},
        {"image": "coffee.png", "prompt": None, "seed": 4, "edit_image": "rocket.png"},
    ]
    (dataset / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    outcome = cli("dataset", "validate", dataset, "--depth", "paths", "--fix", tmp_path / "out.csv")
    assert outcome.err == names("to check it", dataset)
    says(outcome.err)
    assert read_csv(tmp_path / "out.csv") == [
        ["image", "prompt", "seed", "edit_image", "other"],
        ["chelsea.png", 'a "cat",\nand more', "3", '["coffee.png", "rocket.png"]', ""],
        ["coffee.png", "", "4", "rocket.png", ""],
    ]
    (dataset / "metadata.jsonl").unlink()
    (dataset / "chelsea.txt").write_text("a cat")
    cli("dataset", "validate", dataset, "--depth", "paths", "--fix", dataset / "out.csv")
    assert read_csv(dataset / "out.csv") == [["image", "prompt"], ["chelsea.png", "a cat"]]


def test_fix_never_writes_over_anything(refuse_validate, dataset):
    code, message = refuse_validate("--fix", dataset / "metadata.csv")
    assert (code, message) == (2, names(f"{dataset}/metadata.csv", "--fix", "already exists"))
    assert refuse_validate("--fix", dataset / "out.json") == (2, names("--fix", ".csv", f"{dataset}/out.json"))


def test_fix_writes_nothing_that_would_still_be_faulty(refuse_validate, dataset):
    out = dataset / "out.csv"
    (dataset / "metadata.csv").write_text("imge,prompt\nchelsea.png,a\n")
    assert refuse_validate("--fix", out)[0] == 1
    (dataset / "metadata.csv").write_text('image,prompt\nchelsea.png,a\ncoffee.png,"b" c\nrocket.png,d\n')
    code, message = refuse_validate("--fix", out)
    assert code == 1 and message == names(out, "not written", "line 3")
    (dataset / "metadata.csv").write_text("image,prompt\nno.png,a\n")
    assert refuse_validate("--fix", out) == (1, names("every row", out, "not written"))
    assert not out.exists()


@pytest.fixture
def refuse_validate(cli, says, dataset):
    def run(*arguments):
        outcome = cli("dataset", "validate", dataset, "--depth", "paths", *arguments)
        says(f"exit code {outcome.code}\n{outcome.err}")
        (line,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
        return outcome.code, line.removeprefix("error: ")

    return run


def test_training_stops_at_what_the_quick_part_finds(refuse, dataset, tmp_path):
    (tmp_path / "elsewhere.png").write_bytes((dataset / "coffee.png").read_bytes())
    (dataset / "link.png").symlink_to(tmp_path / "elsewhere.png")
    rows = [str(dataset / "coffee.png"), "../elsewhere.png", "link.png", "https://a.b/c.png", "coffee.png", "no.png"]
    captions = ["a", "b", "c", "d", "NaN", "f"]
    lines = [f"{name},{caption}" for name, caption in zip(rows, captions, strict=True)]
    (dataset / "metadata.csv").write_text("\n".join(["image,prompt", *lines, ""]))
    where = f"{dataset}/metadata.csv"
    assert refuse() == (
        1,
        [
            (names(where, "row 1", "image", f"{dataset}/coffee.png", "absolute"), PATHS),
            (names(where, "row 2", "image", "../elsewhere.png", "outside"), names("move the file")),
            (names(where, "row 3", "image", "link.png", "outside", "link.png"), names("replace the link")),
            (names(where, "row 4", "image", "https://a.b/c.png", "URL"), names("download the file")),
            (names(where, "row 5", "caption", "NaN"), "write the caption"),
            (names(where, "row 6", "image", "no.png", "does not exist"), names("correct the path", dataset)),
        ],
    )


def test_a_rehearsal_stops_there_too(refuse, dataset):
    (dataset / "metadata.csv").write_text("image,prompt\ncoffee.png,null\n")
    message = names(f"{dataset}/metadata.csv", "row 1", "caption", "null")
    assert refuse("--rehearse") == (1, [(message, "write the caption")])


@pytest.mark.parametrize("recipe", [(), ("--recipe", "qwen-image-edit-2511-lora")])
def test_no_torch_is_imported(dataset, recipe):
    """Workers are separate processes, which import less than their parent."""
    command = [sys.executable, "-X", "importtime", "-m", "diffsynth_cli", "dataset", "validate", str(dataset), *recipe]
    ended = subprocess.run([*command, "--workers", "1"], capture_output=True, text=True, check=False)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert "diffsynth_core.dataset_report.validate" in imported, ended.stderr[-500:]
    assert "exit code" in ended.stdout
    assert imported & {"torch", "transformers", "diffusers", "peft", "accelerate"} == set()


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("file_timeout", "nan", names("--file_timeout", "nan", "0.001", "seconds")),
        ("min_side", -4, names("--min_side", "-4", "1 or more", "pixels")),
        ("max_crop_loss", 7, names("--max_crop_loss", 7, "0 to 1")),
        ("near_duplicate_distance", 65, names("--near_duplicate_distance", 65, "-1 to 64", "bits")),
    ],
)
def test_a_threshold_that_makes_no_sense(says, cli, dataset, option, value, expected):
    outcome = cli("dataset", "validate", dataset, f"--{option}", value)
    assert (outcome.code, outcome.out) == (2, "")
    says(outcome)
    assert outcome.err == names("error:", expected) and "\n  hint: " in outcome.err


@pytest.mark.parametrize(
    ("text", "fault"),
    [("[" * 200_000, names("nested too deeply")), ('[{"image": ' + "9" * 5000 + "}]", names("too many digits"))],
    ids=["deep", "long number"],
)
def test_json_that_python_does_not_read(cli, dataset, text, fault):
    (dataset / "metadata.csv").unlink()
    path = dataset / "metadata.json"
    path.write_text(text)
    outcome = cli("dataset", "validate", dataset, "--depth", "paths", "--format", "json")
    (finding,) = [one for one in json.loads(outcome.out)["findings"] if one["level"] == "error"]
    assert (outcome.code, finding["code"], finding["message"]) == (1, "PARSE_ERROR", names(path, fault))


def test_a_caption_and_a_folder_that_may_not_be_read(cli, dataset, monkeypatch):
    (dataset / "metadata.csv").unlink()
    for path in dataset.glob("*.png"):
        path.with_suffix(".txt").write_text(path.stem)

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.read_bytes", refuse)
        outcome = cli("dataset", "validate", dataset, "--depth", "paths")
    assert outcome.code == 1 and outcome.out == names("chelsea.txt", "cannot be read", "Permission denied")
    monkeypatch.setattr("os.scandir", refuse)
    outcome = cli("dataset", "validate", dataset, "--depth", "paths")
    assert outcome.code == 1 and "internal error" not in outcome.err
    assert outcome.err == names("error: cannot open", dataset)

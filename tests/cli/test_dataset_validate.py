"""`diffsynth dataset validate`: the table, `--fix`, JSON, and the checks before training."""

import csv
import json
import subprocess
import sys

import pytest

PATHS = "make it relative to the dataset folder"
FAULTY = "image,prompt,note\nchelsea.png,a cat,x\nno.png,none there,x\n/etc/a.png,outside,x\n"


def test_the_table(cli, dataset):
    (dataset / "metadata.csv").write_text(FAULTY + "".join(f"missing{number}.png,m{number},\n" for number in range(6)))
    outcome = cli("dataset", "validate", dataset, "--depth", "metadata")
    assert outcome.code == 0
    outcome = cli("dataset", "validate", dataset, "--depth", "paths")
    lines = [line.rstrip() for line in outcome.out.splitlines()]
    assert outcome.code == 1
    assert "\x1b" not in outcome.out and any(len(line) > 80 for line in lines)  # whole where stdout is no terminal
    assert lines[:3] == [
        "error PATH_MISSING (7)",
        "  A listed file does not exist",
        "      2 column `image` names `no.png`, which does not exist",
    ]
    assert "        and 2 more" in lines
    assert lines.index("error PATH_OUTSIDE (1)") < lines.index("warning COLUMN_UNKNOWN (1)")
    assert lines[-2:] == [
        "8 errors, 4 warnings, 0 infos",
        "exit code 1: the errors would stop or degrade training",
    ]


def test_the_table_is_as_wide_as_the_terminal(cli, dataset, monkeypatch):
    monkeypatch.setattr("diffsynth_cli.text.wrapping.terminal_width", lambda: 40)
    (dataset / "metadata.csv").write_text(FAULTY)
    lines = cli("dataset", "validate", dataset, "--depth", "paths").out.splitlines()
    assert max(map(len, lines)) <= 40
    begin = lines.index("      2 column `image` names `no.png`, ")
    assert lines[begin + 1] == "        which does not exist"


def test_what_could_steer_the_terminal_is_spelled_out(cli, dataset):
    (dataset / "metadata.csv").write_text("image,prompt\n\x1b[31mred.png,[bold]a[/bold]\n")
    outcome = cli("dataset", "validate", dataset, "--depth", "paths")
    assert "\\u001b[31mred.png" in outcome.out and "\x1b" not in outcome.out


def test_a_set_without_errors(cli, dataset):
    outcome = cli("dataset", "validate", dataset, "--workers", 1, "--recipe", "qwen-image-lora", "--batch-size", 3,
                  "--min-area-share", 0)  # fmt: skip
    assert outcome.code == 0
    assert "batch size 3" in outcome.out and "error " not in outcome.out and "warning " not in outcome.out
    assert outcome.out.splitlines()[-1] == "exit code 0: no errors"


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


def test_fix_keeps_rows_without_errors(cli, dataset):
    (dataset / "metadata.csv").write_text(FAULTY)
    before = (dataset / "metadata.csv").read_bytes()
    out = dataset / "whole.csv"
    outcome = cli("dataset", "validate", dataset, "--depth", "paths", "--fix", out)
    assert (outcome.code, read_csv(out)) == (1, [["image", "prompt", "note"], ["chelsea.png", "a cat", "x"]])
    assert f"wrote `{out}`: 1 row, 2 rows removed" in outcome.err
    assert f"`--dataset_base_path {dataset} --dataset_metadata_path {out}`" in outcome.err
    assert (dataset / "metadata.csv").read_bytes() == before
    assert cli("dataset", "validate", out, "--depth", "paths").code == 0


def test_fix_of_json_lines_and_of_captions_beside(cli, dataset, tmp_path):
    (dataset / "metadata.csv").unlink()
    rows = [
        {"image": "chelsea.png", "prompt": 'a "cat",\nand more', "seed": 3, "edit_image": ["coffee.png", "rocket.png"]},
        {"image": "no.png", "prompt": "b", "other": None},
        {"image": "coffee.png", "prompt": None, "seed": 4, "edit_image": "rocket.png"},
    ]
    (dataset / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    outcome = cli("dataset", "validate", dataset, "--depth", "paths", "--fix", tmp_path / "out.csv")
    assert f"to check it as well, write it to `{dataset}`, which its paths are relative to" in outcome.err
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
    assert (code, message) == (
        2,
        f"`{dataset}/metadata.csv` (`--fix`) already exists and is never overwritten",
    )
    assert refuse_validate("--fix", dataset / "out.json") == (
        2,
        f"`--fix` writes a .csv file, got `{dataset}/out.json`",
    )


def test_fix_writes_nothing_that_would_still_be_faulty(refuse_validate, dataset):
    out = dataset / "out.csv"
    (dataset / "metadata.csv").write_text("imge,prompt\nchelsea.png,a\n")
    assert refuse_validate("--fix", out)[0] == 1
    (dataset / "metadata.csv").write_text('image,prompt\nchelsea.png,a\ncoffee.png,"b" c\nrocket.png,d\n')
    code, message = refuse_validate("--fix", out)
    assert code == 1 and message.startswith(f"`{out}` was not written, because removing rows does not fix this: ")
    (dataset / "metadata.csv").write_text("image,prompt\nno.png,a\n")
    assert refuse_validate("--fix", out) == (1, f"every row has errors; `{out}` was not written")
    assert not out.exists()


@pytest.fixture
def refuse_validate(cli, dataset):
    def run(*arguments):
        outcome = cli("dataset", "validate", dataset, "--depth", "paths", *arguments)
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
    where = f"`{dataset}/metadata.csv` row"
    column = "column `image` names"
    assert refuse() == (
        1,
        [
            (f"{where} 1: {column} `{dataset}/coffee.png`, which is absolute", PATHS),
            (
                f"{where} 2: {column} `../elsewhere.png`, which is outside the dataset",
                "move the file into the dataset",
            ),
            (
                f"{where} 3: {column} `link.png`, a link to outside the dataset (`link.png`)",
                "replace the link with the file",
            ),
            (f"{where} 4: {column} `https://a.b/c.png`, a URL", "download the file and use its path"),
            (f"{where} 5: the caption is `NaN`, a placeholder for a missing value", "write the caption"),
            (
                f"{where} 6: {column} `{dataset}/no.png`, which does not exist",
                "correct the path (relative to `dataset_base_path`), or remove the row",
            ),
        ],
    )


def test_a_rehearsal_stops_there_too(refuse, dataset):
    (dataset / "metadata.csv").write_text("image,prompt\ncoffee.png,null\n")
    message = f"`{dataset}/metadata.csv` row 1: the caption is `null`, a placeholder for a missing value"
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
        ("file_timeout", "nan", "`--file_timeout` is nan, expected 0.001 or more (seconds)"),
        ("min_side", -4, "`--min_side` is -4, expected 1 or more (pixels)"),
        ("max_crop_loss", 7, "`--max_crop_loss` is 7, expected 0 to 1 (share)"),
        ("near_duplicate_distance", 65, "`--near_duplicate_distance` is 65, expected -1 to 64 (bits of 64)"),
    ],
)
def test_a_threshold_that_makes_no_sense(cli, dataset, option, value, expected):
    outcome = cli("dataset", "validate", dataset, f"--{option}", value)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"error: {expected}\n  hint: choose a number in this range\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [("[" * 200_000, "it is nested too deeply"), ('[{"image": ' + "9" * 5000 + "}]", "a number has too many digits")],
)
def test_json_that_python_does_not_read(cli, dataset, text, fault):
    (dataset / "metadata.csv").unlink()
    path = dataset / "metadata.json"
    path.write_text(text)
    outcome = cli("dataset", "validate", dataset, "--depth", "paths", "--format", "json")
    (finding,) = [one for one in json.loads(outcome.out)["findings"] if one["level"] == "error"]
    assert (outcome.code, finding["code"], finding["message"]) == (1, "PARSE_ERROR", f"`{path}`: {fault}")


def test_a_caption_and_a_folder_that_may_not_be_read(cli, dataset, monkeypatch):
    (dataset / "metadata.csv").unlink()
    for path in dataset.glob("*.png"):
        path.with_suffix(".txt").write_text(path.stem)

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.read_bytes", refuse)
        outcome = cli("dataset", "validate", dataset, "--depth", "paths")
    assert outcome.code == 1 and "`chelsea.txt` cannot be read: Permission denied" in outcome.out
    monkeypatch.setattr("os.scandir", refuse)
    outcome = cli("dataset", "validate", dataset, "--depth", "paths")
    assert outcome.code == 1 and "internal error" not in outcome.err
    assert outcome.err.startswith(f"error: cannot open `{dataset}")

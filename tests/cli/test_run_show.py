"""`run show`: a run as text, and its progress until it ends."""

import json
import subprocess
import sys
import time

import pytest

from diffsynth_core.checkpoints.run_folder import METRICS, RECORD
from tests.killing import TrainingRun
from tests.naming import names
from tests.run_folders import metric_lines, write_previews, write_run


@pytest.mark.parametrize("status", ["running", "completed", "interrupted", "failed"])
def test_a_run_as_text(cli, says, tmp_path, status):
    folder = write_run(tmp_path / "my run", 900, 900 if status == "completed" else 1200, status, every=90)
    write_previews(folder, 900, 0.2, size=(32, 24))
    content = json.loads((folder / RECORD).read_text())
    failure = "Diverged: the loss is not finite in step 901" if status == "failed" else None
    (folder / RECORD).write_text(json.dumps(content | {"failure": failure}))
    outcome = cli("run", "show", folder)
    assert outcome.code == 0
    says(outcome)


def test_a_folder_that_is_not_a_run(cli, tmp_path):
    outcome = cli("run", "show", tmp_path)
    assert outcome.code == 1 and outcome.out == ""
    assert outcome.err == names(tmp_path, "is not the folder of a run") and outcome.err == names("hint: ", RECORD)


def test_texts_of_the_run_do_not_steer_the_terminal(cli, tmp_path):
    folder = write_run(tmp_path / "a\x1b]0;taken\x07", 4, 9, "failed")
    content = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(content | {"failure": "x\x1b[2J\u202e\nStatus      completed"}))
    shown = cli("run", "show", folder).out
    assert "\x1b" not in shown and "\x07" not in shown and "\u202e" not in shown
    assert len([line for line in shown.splitlines() if line.startswith("Status")]) == 1


@pytest.mark.parametrize(("ending", "code"), [("completed", 0), ("interrupted", 1)])
def test_a_run_is_followed_until_it_ends(cli, tmp_path, monkeypatch, ending, code):
    monkeypatch.setattr("diffsynth_cli.commands.run.PROGRESS_SECONDS", 0.0)
    folder = write_run(tmp_path / "run", 4, 9)

    def append(last: int) -> None:
        with (folder / METRICS).open("a") as stream:
            stream.writelines(f"{line}\n" for line in metric_lines(last - 1, last, 9))

    happenings = iter(
        (
            lambda: append(6),
            lambda: write_previews(folder, 6, 0.2, size=(32, 24)),
            lambda: write_run(folder, 9, 9, every=3),
            lambda: write_run(folder, 9, 9, ending, every=3),
        )
    )
    monkeypatch.setattr("diffsynth_cli.commands.run.time.sleep", lambda seconds: next(happenings)())
    outcome = cli("run", "show", folder, "--follow")
    assert outcome.code == code
    for line in (
        "step 6 of 9 (67%), about 4 s of steps left; loss",
        "saved step-9.safetensors (94.4 MB)",
        f"Status      {ending}",
    ):
        assert line in outcome.out
    assert outcome.out == names("validation loss", "after step 9")
    assert f"4 previews in {folder}/samples/step-6\n" in outcome.out


def test_following_a_run_that_has_ended(cli, tmp_path):
    folder = write_run(tmp_path / "run", 9, 9, "completed")
    assert cli("run", "show", folder, "--follow").out == cli("run", "show", folder).out


def test_ctrl_c_ends_the_following(tmp_path):
    folder = write_run(tmp_path / "run", 4, 9)

    class Following(TrainingRun):
        command = "run"

    with (tmp_path / "out").open("w") as out:
        following = Following(["show", str(folder), "--follow"], tmp_path, tmp_path, stdout=out)
        deadline = time.monotonic() + 60
        while "Status" not in (tmp_path / "out").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        following.process.send_signal(2)
        assert following.process.wait() == 130
    assert following.stderr() == "Interrupted\n"


def test_it_imports_neither_torch_nor_the_models(tmp_path):
    folder = write_run(tmp_path / "run", 4, 9)
    command = [sys.executable, "-X", "importtime", "-m", "diffsynth_cli", "run", "show", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert (
        "diffsynth_core.run_page.facts" in imported and not {"torch", "PIL", "rich", "diffsynth_core.models"} & imported
    )

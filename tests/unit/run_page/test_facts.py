"""What is read from the folder of a run, also while it is written."""

import json
import math
import os
import time

import pytest

from diffsynth_core.checkpoints.run_folder import (
    LOCK,
    METRICS,
    RECORD,
    VALIDATIONS,
    PreviewImage,
    PreviewList,
    claim_folder,
)
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.run_page.facts import QUIET_SECONDS, RunReader, read_run
from diffsynth_core.run_page.previews import by_prompt
from tests.naming import names
from tests.run_folders import PROMPTS, metric_lines, write_previews, write_run


def _change(folder, **values):
    content = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(content | values))


def test_a_reader_adds_what_was_written_since(tmp_path):
    folder = write_run(tmp_path / "run", 10, 100)
    reader = RunReader(folder)
    assert reader.read().step == 10
    lines = metric_lines(11, 13, 100)
    with (folder / METRICS).open("a") as stream:
        stream.write(f"{lines[0]}\n{lines[1]}\n{lines[2][:20]}")
    assert list(reader.read().series.steps) == list(range(1, 13)), "a line is read once it is complete"
    with (folder / METRICS).open("a") as stream:
        stream.write(f"{lines[2][20:]}\n")
    assert list(reader.read().series.steps) == list(range(1, 14))


def test_a_resumed_run_is_read_again(tmp_path):
    """Its lines after the state were removed, in a new file of the same name."""
    folder = write_run(tmp_path / "run", 10, 100, every=2)
    reader = RunReader(folder)
    reader.read()
    for name, last in ((METRICS, 6), (VALIDATIONS, 4)):
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / "new").write_text("".join(lines[:last]))
        (folder / "new").rename(folder / name)
    facts = reader.read()
    assert list(facts.series.steps) == [1, 2, 3, 4, 5, 6]
    assert [one.step for one in facts.validations] == [0, 2, 4, 6]


def test_lines_that_are_no_steps_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run", 2, 9)
    with (folder / METRICS).open("ab") as stream:
        stream.write(
            b'\xff\n[1]\n{"step": "3"}\n{"step": -1}\n{"loss": 1}\n' + b"[" * 9000 + b'\n{"step": 3, "loss": null}\n'
        )
    series = read_run(folder).series
    assert list(series.steps) == [1, 2, 3] and math.isnan(series.last("loss"))


def test_time_left_is_that_of_the_latest_steps(tmp_path):
    folder = write_run(tmp_path / "run", 4, 10)
    lines = [{"step": step, "seconds": seconds} for step, seconds in enumerate((60, 2, 2, 5), 1)]
    (folder / METRICS).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    facts = read_run(folder)
    assert (facts.step_seconds, facts.seconds_left) == (3, 18), "without the first step, which warms up"
    _change(folder, status="completed")
    assert math.isnan(read_run(folder).seconds_left)


def test_a_run_of_another_version_is_read(tmp_path):
    """Later ones record more, earlier ones less."""
    folder = write_run(tmp_path / "run", 4, every=2)
    content = json.loads((folder / RECORD).read_text())
    for name in ("id", "tracked", "tf32", "seconds", "best_checkpoint"):
        del content[name]
    content["checkpoints"][0]["of_later_versions"] = content["of_later_versions"] = {"a": [1]}
    (folder / RECORD).write_text(json.dumps(content))
    assert len(read_run(folder).record.checkpoints) == 2


def test_a_run_that_only_has_a_record(tmp_path):
    folder = write_run(tmp_path / "run", 4)
    (folder / METRICS).unlink()
    facts = read_run(folder)
    assert (facts.step, facts.validations, facts.previews) == (4, (), ()) and math.isnan(facts.step_seconds)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: None, names("does not exist")),
        (lambda folder: folder.mkdir(), names("is not the folder of a run")),
        (lambda folder: folder.touch(), names("is not the folder of a run")),
        (lambda folder: (folder.mkdir(), (folder / RECORD).write_text("{")), names("is not valid JSON")),
        (lambda folder: (write_run(folder, 1), _change(folder, status="well")), names("status", "well")),
        (lambda folder: (write_run(folder, 1), _change(folder, checkpoints=[1])), names("checkpoints[0]")),
    ],
)
def test_what_is_no_run_is_one_error(tmp_path, make, expected):
    make(tmp_path / "run")
    with pytest.raises(DiffSynthError) as raised:
        read_run(tmp_path / "run")
    (problem,) = raised.value.problems
    assert problem.message == expected and problem.hint == names(RECORD)


def test_a_killed_run_is_told_from_one_that_takes_long(tmp_path):
    folder = write_run(tmp_path / "run", 4, 10)
    (folder / LOCK).touch()
    assert read_run(folder).status == "running", "it has just written"
    long_ago = time.time() - 2 * QUIET_SECONDS
    for path in folder.iterdir():
        os.utime(path, (long_ago, long_ago))
    with claim_folder(folder):
        assert read_run(folder).status == "running"
    assert read_run(folder).status == "killed"
    _change(folder, status="interrupted")
    assert read_run(folder).status == "interrupted"


def test_previews_are_read_once_their_list_is_there(tmp_path):
    folder = write_run(tmp_path / "run", 4)
    for step in (100, 20, 3):
        write_previews(folder, step, 0.5, size=(32, 24))
    (folder / "samples/step-3/images.json").unlink()
    (folder / "samples/step-9").mkdir()
    PreviewList(9, (PreviewImage("../../x.png", "", 0, 1, 1, 1),)).save(folder / "samples/step-9")
    previews = read_run(folder).previews
    assert [preview.step for preview in previews] == [20, 100]
    assert [(one.prompt, list(one.images)) for one in by_prompt(previews)] == [
        (prompt, [20, 100]) for prompt in PROMPTS
    ]


def test_a_prompt_that_stands_in_the_file_several_times_and_one_that_is_new(tmp_path):
    folder = write_run(tmp_path / "run", 4)
    write_previews(folder, 1, 0.5, ("old", "both"), (32, 24))
    for step in (2, 3):
        write_previews(folder, step, 0.5, ("new", "both", "new"), (32, 24))
        path = folder / f"samples/step-{step}/images.json"
        path.write_text(path.read_text().replace('"seed": 2', '"seed": 0'))
    found = [(one.prompt, one.seed, list(one.images)) for one in by_prompt(read_run(folder).previews)]
    assert found == [("both", 1, [1, 2, 3]), ("new", 0, [2, 3]), ("new", 0, [2, 3]), ("old", 0, [1])]

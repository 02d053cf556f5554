"""The run record and metrics: written atomically, read back unchanged, truncated when a run is resumed."""

import json

import pytest

from diffsynth_core.checkpoints.run_folder import (
    CheckpointEntry,
    MetricsFile,
    RunRecord,
    checkpoint_files,
    read_record,
)
from diffsynth_core.errors import DiffSynthError, Problem
from tests.naming import names


def record(**changes) -> RunRecord:
    values = {
        "parameters": {"lora_rank": 4, "output_path": "ä b", "model_paths": [["a", "b"]]},
        "family": "qwen-image",
        "seed": 3,
        "dataset_fingerprint": "ab",
        "components": {"dit": {"a.safetensors": "cd"}},
        "mixed_precision": "bf16",
        "micro_batches_per_step": 4,
    }
    return RunRecord(**{**values, **changes})


ENTRY = CheckpointEntry("step-5.safetensors", 5, 0, "ef", 123)


def test_a_record_comes_back_as_it_was(tmp_path):
    before = record(status="interrupted", step=5, total_steps=9, samples_seen=20, failure="x\ny")
    before.add_checkpoint(ENTRY)
    before.save(tmp_path)
    assert read_record(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_record_is_plain_json_that_says_when_and_with_what(tmp_path):
    record().save(tmp_path)
    content = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert content["status"] == "running"
    assert content["parameters"]["output_path"] == "ä b"
    assert "ä b" in (tmp_path / "run.json").read_text(encoding="utf-8")
    assert content["started"] <= content["updated"]
    assert content["started"].endswith("+00:00")
    assert {"python", "torch", "diffusers", "diffsynth-cli"} <= content["versions"].keys()


def test_saving_again_replaces_the_record(tmp_path):
    mine = record()
    mine.save(tmp_path)
    mine.status, mine.step = "completed", 9
    mine.save(tmp_path)
    assert (read_record(tmp_path).status, read_record(tmp_path).step) == ("completed", 9)


def test_a_checkpoint_of_the_same_name_takes_the_place_of_the_first():
    mine = record(checkpoints=[ENTRY, CheckpointEntry("step-9.safetensors", 9, 1, "00", 1)])
    mine.add_checkpoint(CheckpointEntry("step-5.safetensors", 5, 0, "new", 7))
    assert [(entry.file, entry.sha256) for entry in mine.checkpoints] == [
        ("step-9.safetensors", "00"),
        ("step-5.safetensors", "new"),
    ]


def test_a_folder_without_a_record_has_none(tmp_path):
    assert read_record(tmp_path) is None
    assert read_record(tmp_path / "gone") is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "", names("not valid JSON", "line 1", "column 1", "is empty")),
        (
            lambda text: text[: text.index('"seed"') + 3],
            names("not valid JSON", "line 13", "column 3", "Unterminated"),
        ),
        (lambda text: "[]", names("a list", "an object")),
        (lambda text: "null", names("null", "an object")),
        (lambda text: text.replace('"seed"', '"sed"'), names("seed", "missing")),
        (lambda text: text.replace('"step": 0', '"step": "0"'), names("step", '"0"', "an integer")),
        (
            lambda text: text.replace('"checkpoints": []', '"checkpoints": [{"file": "x"}]'),
            names("step", "epoch", "sha256", "bytes", "missing", "checkpoints[0]"),
        ),
        (lambda text: text.replace('"checkpoints": []', '"checkpoints": 3'), names("checkpoints", 3, "a list")),
        (lambda text: "\udcff", names("not UTF-8", "byte 0")),
    ],
)
def test_a_damaged_record_is_told_by_name_and_place(says, tmp_path, damage, message):
    record().save(tmp_path)
    path = tmp_path / "run.json"
    path.write_bytes(damage(path.read_text(encoding="utf-8")).encode("utf-8", "surrogateescape"))
    with pytest.raises(DiffSynthError) as caught:
        read_record(tmp_path)
    says(caught.value.problems)
    assert caught.value.problems == (Problem(names(path, message), names("--output_path")),)


def test_what_stands_in_the_place_of_a_record_is_not_taken_for_none(tmp_path):
    (tmp_path / "run.json").mkdir()
    with pytest.raises(DiffSynthError, match="is a folder, expected a file"):
        read_record(tmp_path)


def test_a_folder_whose_name_is_not_utf8_is_recorded(tmp_path):
    written = record()
    written.parameters["dataset_base_path"] = "photos-\udcff"
    written.save(tmp_path)
    assert read_record(tmp_path).parameters["dataset_base_path"] == "photos-\udcff"


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ((), []),
        (
            ("step-5.safetensors", "epoch-0.safetensors", "epoch-1.safetensors.tmp"),
            ["epoch-0.safetensors", "step-5.safetensors"],
        ),
        (("model.safetensors", "steps-1.safetensors", "step-1.pt", "run.json"), []),
    ],
)
def test_checkpoints_are_known_by_their_names(tmp_path, names, found):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert checkpoint_files(tmp_path) == found


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def write_steps(folder, steps, done_steps=0) -> None:
    metrics = MetricsFile(folder / "metrics.jsonl", done_steps, pytest.fail)
    for step in steps:
        metrics.write({"step": step, "loss": step / 2, "lr": None})
    metrics.close()


def test_each_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0, pytest.fail)
    for step in (1, 2):
        metrics.write({"step": step, "loss": 0.1})
        assert lines(tmp_path)[-1] == {"step": step, "loss": 0.1}
    metrics.close()


@pytest.mark.parametrize(("done", "kept"), [(0, []), (2, [1, 2]), (4, [1, 2, 3, 4]), (9, [1, 2, 3, 4])])
def test_going_on_takes_later_lines_out(tmp_path, done, kept):
    write_steps(tmp_path, [1, 2, 3, 4])
    write_steps(tmp_path, [done + 1], done)
    assert [line["step"] for line in lines(tmp_path)] == [*kept, done + 1]
    assert lines(tmp_path)[0].get("loss") == lines(tmp_path)[0]["step"] / 2


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step"', "{", "[3]", '{"loss": 1}', '{"step": "x"}', "\0\0\0"])
def test_a_torn_last_line_is_taken_out(tmp_path, torn):
    write_steps(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(torn)
    write_steps(tmp_path, [3], 9)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_last_line_without_its_newline_is_kept_apart_from_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}', encoding="utf-8")
    write_steps(tmp_path, [2], 1)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_every_line_is_json_that_any_program_reads(tmp_path, value):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0, pytest.fail)
    metrics.write({"step": 1, "grad_norm": value})  # what float16 scaling gives before it finds its scale
    metrics.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)["step"] == 1

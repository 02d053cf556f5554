"""Output folders that must not be written to stay unchanged."""

from pathlib import Path

from tests.naming import names

NEW_FOLDER = names("--output_path")


def test_a_folder_that_holds_a_run(cli, refuse, dataset):
    run = ("--device", "cpu", "--dataset_num_workers", 0, "--max_steps", 1, "--output_path", "out")
    outcome = cli("train", "--recipe", "qwen-image-lora", "--dataset_base_path", dataset, *run)
    assert outcome.code == 0, outcome.err
    message = names("output_path", "out", "already holds a run", "completed", "1 of 1 step")
    hint = names("--resume auto", "--output_path")
    assert refuse("--output_path", "out") == (2, [(message, hint)])
    assert refuse("--output_path", "out", "--rehearse") == (2, [(message, NEW_FOLDER)])
    assert refuse("--output_path", "out", "--resume", "auto", "--learning_rate", 1, "--num_epochs", 9) == (
        2,
        [
            (
                names("learning_rate", "0.0001", "out", 1),
                names("--output_path", "--lora_checkpoint out/epoch-0.safetensors"),
            ),
            (names("out", "1 step", 1, "--num_epochs", "--max_steps"), None),
        ],
    )


def test_a_folder_that_holds_foreign_checkpoints(refuse):
    Path("out").mkdir()
    for name in ("epoch-1.safetensors", "step-500.safetensors", "notes.txt"):
        Path("out", name).write_bytes(b"mine")
    message = names("output_path", "out", "another program", "epoch-1.safetensors", "step-500.safetensors")
    assert refuse("--output_path", "out") == (2, [(message, NEW_FOLDER)])
    assert refuse("--output_path", "out", "--resume", "auto") == (2, [(message, NEW_FOLDER)])


def test_a_damaged_record(refuse):
    Path("out").mkdir()
    Path("out/run.json").write_text('{"status": "runn')
    code, [(message, hint)] = refuse("--output_path", "out")
    assert (code, hint) == (1, names("--output_path"))
    assert message == names("out/run.json", "not valid JSON", "line 1", "column 12", "Unterminated")


def test_a_file_in_the_way(refuse):
    Path("out").write_text("mine")
    assert refuse("--output_path", "out") == (2, [(names("output_path", "out", "is a file"), "choose a folder")])


def test_a_file_in_the_way_above(refuse):
    Path("out").write_text("mine")
    code, [(message, _)] = refuse("--output_path", "out/run")
    assert code == 2
    assert message == names("output_path", "out/run", "out", "is a file")

"""Resuming: the same weights with and without an interruption, for every way of stopping."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.killing import steps_done
from tests.waiting import alive, wait_until

RECIPE = (
    "--recipe",
    "qwen-image-lora",
    "--dataset_num_workers",
    0,
    "--dataset_repeat",
    3,
    "--num_epochs",
    1,
    "--learning_rate",
    0.01,
)


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_tensors(left: Path, right: Path) -> bool:
    one, other = load_file(left), load_file(right)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "extra",
    [(), ("--batch_size", 2, "--gradient_accumulation_steps", 2), ("--lr_scheduler", "cosine", "--lr_warmup_steps", 3)],
    ids=str,
)
def test_a_resumed_run_ends_with_the_same_weights_and_metrics(cli, photographs, tmp_path, extra):
    """Stopped after every save and resumed, against uninterrupted: bit-identical."""
    common = ("train", *RECIPE, *extra, "--dataset_base_path", photographs, "--save_steps", 2)
    assert cli(*common, "--output_path", tmp_path / "through").code == 0
    total = record_of(tmp_path / "through")["total_steps"]
    for stop in (*range(2, total, 2), total):
        # max_steps changes a schedule that ends at the last step; those runs are cut as by a signal below.
        if "--lr_scheduler" in extra:
            break
        outcome = cli(*common, "--output_path", tmp_path / "pieces", "--resume", "auto", "--max_steps", stop)
        assert outcome.code == 0, outcome.err
    if "--lr_scheduler" in extra:
        _run_in_pieces(common, tmp_path / "pieces")
    last = record_of(tmp_path / "through")["checkpoints"][-1]["file"]
    assert same_tensors(tmp_path / "through" / last, tmp_path / "pieces" / last)
    kept = ("step", "epoch", "samples_seen", "loss", "lr", "grad_norm")
    through, pieces = (
        [{name: line[name] for name in kept} for line in metrics_of(tmp_path / name)] for name in ("through", "pieces")
    )
    assert through == pieces


def _run_in_pieces(common: tuple[object, ...], folder: Path) -> None:
    """Run the same, stopped after step 5 as by a signal."""
    from diffsynth_cli.console import ConsoleReporter
    from diffsynth_core.config.resolve import resolve
    from diffsynth_core.planning.plan import make_plan
    from diffsynth_core.stop import StopRequest
    from diffsynth_core.training.loop import train

    words = [str(word) for word in common[1:]]
    flags = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)} | {
        "output_path": str(folder)
    }
    reporter = ConsoleReporter()
    train(make_plan(resolve(flags), reporter), reporter, StopRequest(), stop_after=5)
    train(make_plan(resolve(flags | {"resume": "auto"}), reporter), reporter, StopRequest())
    reporter.close()


def test_resume_begins_anew_where_there_is_nothing(cli, photographs):
    outcome = cli(
        "train",
        *RECIPE,
        "--dataset_base_path",
        photographs,
        "--output_path",
        "out",
        "--max_steps",
        2,
        "--resume",
        "auto",
    )
    assert outcome.code == 0, outcome.err
    assert [line["step"] for line in metrics_of(Path("out"))] == [1, 2]


def test_a_completed_run_goes_on_when_more_is_asked_for(cli, photographs):
    common = ("train", *RECIPE, "--dataset_base_path", photographs, "--output_path", "out", "--resume", "auto")
    assert cli(*common, "--max_steps", 2).code == 0
    again = cli(*common, "--max_steps", 2)
    assert again.code == 0 and again.out == ""
    assert again.err.endswith(
        "Nothing left to do: the run in `out` has completed 2 steps and the parameters request 2; request more with `--num_epochs` or `--max_steps`\n"
    )
    assert cli(*common, "--max_steps", 3).code == 0
    assert [line["step"] for line in metrics_of(Path("out"))] == [1, 2, 3]
    assert record_of(Path("out"))["status"] == "completed"


def test_resume_refuses_other_parameters_and_other_images(cli, dataset):
    common = ("train", *RECIPE, "--dataset_base_path", dataset, "--output_path", "out", "--resume", "auto")
    assert cli(*common, "--max_steps", 2).code == 0
    other = cli(*common, "--learning_rate", 0.5, "--seed", 4, "--max_steps", 4)
    assert other.code == 2
    assert "`learning_rate` was `0.01` in the run in `out`, now it is `0.5`" in other.err
    assert "`seed` was `0`" in other.err
    (dataset / "metadata.csv").write_text((dataset / "metadata.csv").read_text().replace("a cat", "a dog"))
    changed = cli(*common, "--max_steps", 4)
    assert changed.code == 1 and "the dataset has changed" in changed.err


def test_resume_takes_the_last_whole_state(cli, photographs):
    """A state without its last file is incomplete, and reported; later metrics are removed."""
    common = ("train", *RECIPE, "--dataset_base_path", photographs, "--output_path", "out", "--resume", "auto")
    assert cli(*common, "--max_steps", 3).code == 0
    half = Path("out/state/step-9")
    half.mkdir()
    (half / "trained.safetensors").write_bytes(b"half")
    with Path("out/metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    outcome = cli(*common, "--max_steps", 5)
    assert outcome.code == 0
    assert "warning: the state after step 9 is damaged (`state.json` is missing): 6 steps are lost" in outcome.err
    assert [line["step"] for line in metrics_of(Path("out"))] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        *(pytest.param(*one, marks=pytest.mark.long) for one in ((signal.SIGTERM, 143), (signal.SIGHUP, 129))),
    ],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)
def test_a_signal_finishes_the_step_saves_and_exits(cli, tiny_models, photographs, tmp_path, number, code):
    """A real process with data workers, stopped in the middle of its run; then resumed."""
    command = [
        sys.executable,
        "-m",
        "diffsynth_cli",
        "train",
        "--recipe",
        "qwen-image-lora",
        "--dataset_num_workers",
        "2",
    ]
    command += [
        "--dataset_repeat",
        "100000",
        "--dataset_base_path",
        str(photographs),
        "--output_path",
        str(tmp_path / "out"),
    ]
    environment = os.environ | {"DIFFSYNTH_MODEL_BASE_PATH": str(tiny_models)}
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True
    )
    wait_until(lambda: alive(process) and steps_done(tmp_path / "out") >= 3)
    # To the whole group, as a terminal, `timeout` or a cluster does: data workers must not die of it.
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    record = record_of(tmp_path / "out")
    assert record["status"] == "interrupted"
    assert len(metrics_of(tmp_path / "out")) == record["step"]
    assert record["checkpoints"][-1]["file"] == f"step-{record['step']}.safetensors"
    again = cli(*command[3:], "--resume", "auto", "--max_steps", record["step"] + 2)
    assert again.code == 0, again.err
    assert [line["step"] for line in metrics_of(tmp_path / "out")] == list(range(1, record["step"] + 3))

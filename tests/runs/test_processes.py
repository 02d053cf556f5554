"""Two processes under gloo: the same weights as one that accumulates two micro-batches, and one stop for both."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

TRAIN = [
    "train",
    "--recipe",
    "qwen-image-lora",
    "--dataset_num_workers",
    "0",
    "--learning_rate",
    "0.01",
    "--device",
    "cpu",
]


def launch(processes: int, arguments: list[str], models: Path, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "diffsynth_cli", *TRAIN, *arguments]
    if processes > 1:
        launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        command = [sys.executable, *launcher, "-m", *command[2:]]
    environment = os.environ | {
        "DIFFSYNTH_MODEL_BASE_PATH": str(models),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_two_processes_train_what_one_does_with_accumulation(tiny_models, photographs, tmp_path):
    common = ["--dataset_base_path", str(photographs), "--dataset_repeat", "2", "--num_epochs", "1"]
    two = launch(2, [*common, "--output_path", "two"], tiny_models, tmp_path)
    output, errors = two.communicate(timeout=300)
    assert two.returncode == 0, errors
    assert output.count("Checkpoint  ") == 1, "one process tells"
    one = launch(1, [*common, "--output_path", "one", "--gradient_accumulation_steps", "2"], tiny_models, tmp_path)
    _, errors = one.communicate(timeout=300)
    assert one.returncode == 0, errors
    left, right = (load_file(tmp_path / name / "epoch-0.safetensors") for name in ("one", "two"))
    assert left.keys() == right.keys()
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 1e-5


def test_a_signal_to_the_group_stops_both_in_the_same_step(tiny_models, photographs, tmp_path):
    process = launch(
        2,
        ["--dataset_base_path", str(photographs), "--dataset_repeat", "100000", "--output_path", "out"],
        tiny_models,
        tmp_path,
    )
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=120)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "interrupted"
    assert record["checkpoints"][-1]["step"] == record["step"]

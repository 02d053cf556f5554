"""Ratios measured in one run on one machine; `make bench` runs them, CI does not."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest


def timed_process(command: list[str], **options: object) -> tuple[float, float]:
    """(wall seconds, peak memory in MiB) of a command as a whole process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return time.perf_counter() - started, usage.ru_maxrss / 1024


@pytest.fixture
def start_to_first_step(tiny_models: Path, photographs: Path, tmp_path: Path) -> Callable[..., tuple[float, float]]:
    """Wall seconds and peak MiB of a training process of one step, its encodings cached."""
    counter = iter(range(1000))

    def run(*arguments: str) -> tuple[float, float]:
        command = [sys.executable, "-m", "diffsynth_cli", "train", "--recipe", "qwen-image-lora", "--max_steps", "1"]
        command += [
            "--dataset_num_workers",
            "0",
            "--dataset_base_path",
            str(photographs),
            "--output_path",
            str(tmp_path / f"run-{next(counter)}"),
        ]
        return timed_process(
            [*command, *arguments], env=os.environ | {"DIFFSYNTH_MODEL_BASE_PATH": str(tiny_models)}, cwd=tmp_path
        )

    run()
    return run

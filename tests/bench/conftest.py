"""Ratios measured in one run on one machine.

`make bench` measures at full size and judges. Without `--measure`, as in CI, every bench runs at the size of seconds
and judges nothing, so that it cannot stop working unnoticed.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")


@dataclass
class Bench:
    """The size of a measurement, and its figures.

    `measures`: full size, and figures are held against their limits.
    """

    measures: bool
    figures: list[str] = field(default_factory=list)

    def size(self, full: T, small: T) -> T:
        """How large to be."""
        return full if self.measures else small

    def rounds(self, number: int) -> int:
        """How often to repeat what is timed."""
        return self.size(number, 1)

    def at_most(self, what: str, figure: float, limit: float, detail: str = "") -> None:
        """Note a figure, and hold it against its limit."""
        assert figure > 0, what
        shown = f"| {what} | {figure:.3g} | {limit:g} | {detail} |"
        self.figures.append(shown)
        print(f"\n{shown}")
        assert figure <= limit or not self.measures, shown


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """What this session measures; its figures are printed as a table at the end."""
    bench = Bench(request.config.getoption("--measure"))
    yield bench
    if bench.measures:
        print("\n\n| figure | measured | at most | |\n|---|---|---|---|", *bench.figures, sep="\n")


def timed_process(command: list[str], **options: object) -> tuple[float, float]:
    """(wall seconds, peak memory in MiB) of a command as a whole process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return time.perf_counter() - started, usage.ru_maxrss / 1024


@pytest.fixture(scope="module")
def start_to_first_step(
    tiny_models: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[float, float]]:
    """Wall seconds and peak MiB of a training process of one step, its encodings cached."""
    folder = tmp_path_factory.mktemp("runs")
    counter = iter(range(1000))

    def run(*arguments: str) -> tuple[float, float]:
        command = [sys.executable, "-m", "diffsynth_cli", "train", "--recipe", "qwen-image-lora", "--max_steps", "1"]
        command += ["--dataset_num_workers", "0", "--dataset_base_path", str(photographs)]
        command += ["--output_path", str(folder / f"run-{next(counter)}"), *arguments]
        return timed_process(command, env=os.environ | {"DIFFSYNTH_MODEL_BASE_PATH": str(tiny_models)}, cwd=folder)

    run()
    return run

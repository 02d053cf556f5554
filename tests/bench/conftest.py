"""Benchmarks: ratios measured in one run on one machine.

`make bench` measures at full size and checks limits. Without `--measure`, as in CI, every benchmark runs for seconds
and checks nothing, so that it cannot break unnoticed.
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

    Attributes:
        measures: run at full size, and check figures against their limits.
    """

    measures: bool
    figures: list[str] = field(default_factory=list)

    def size(self, full: T, small: T) -> T:
        """Return the size to use."""
        return full if self.measures else small

    def rounds(self, number: int) -> int:
        """Return the number of repetitions of what is timed."""
        return self.size(number, 1)

    def at_most(self, what: str, figure: float, limit: float, detail: str = "") -> None:
        """Record a figure, and check it against its limit."""
        assert figure > 0, what
        shown = f"| {what} | {figure:.3g} | {limit:g} | {detail} |"
        self.figures.append(shown)
        print(f"\n{shown}")
        assert figure <= limit or not self.measures, shown


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """The session's benchmark; its figures are printed as a table at the end."""
    bench = Bench(request.config.getoption("--measure"))
    yield bench
    if bench.measures:
        print("\n\n| figure | measured | at most | |\n|---|---|---|---|", *bench.figures, sep="\n")


def timed_process(command: list[str], **options: object) -> tuple[float, float]:
    """Run a command, and return (wall seconds, peak memory in MiB)."""
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
    """Return wall seconds and peak MiB of a training process with one step and cached encodings."""
    folder = tmp_path_factory.mktemp("runs")
    counter = iter(range(1000))

    def run(*arguments: str) -> tuple[float, float]:
        command = [sys.executable, "-m", "diffsynth_cli", "train", "--recipe", "qwen-image-lora", "--max_steps", "1"]
        command += ["--dataset_num_workers", "0", "--dataset_base_path", str(photographs)]
        command += ["--output_path", str(folder / f"run-{next(counter)}"), *arguments]
        return timed_process(command, env=os.environ | {"DIFFSYNTH_MODEL_BASE_PATH": str(tiny_models)}, cwd=folder)

    run()
    return run

"""Runs in two processes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.runs.engines import TwoProcesses


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoProcesses]:
    """Two processes that are started once for all tests; `--num_processes` starts others."""
    with TwoProcesses(tmp_path_factory.mktemp("two_processes")) as started:
        yield started


@pytest.fixture
def train_in_two(two_processes: TwoProcesses, cli: object, tiny_models: Path, photographs: Path) -> Callable[..., Path]:
    """Train on the photographs in two processes, and return the folder of the run."""

    def run(folder: str, *flags: object, engine: str = "ddp") -> Path:
        words = map(str, ("--dataset_base_path", photographs, *flags))
        two_processes.train(engine, {Path(folder): tuple(words)}, tiny_models)
        return Path(folder)

    return run

"""Host memory that is left: of the machine, and of a container with a limit of its own."""

from pathlib import Path

import psutil
import pytest

from diffsynth_core.planning.memory.host_memory import LIMITS, available_bytes

GB = 10**9


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 64 GB left."""
    here = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: here._replace(available=64 * GB))


def write(folder: Path, version: int, limit: str, used: int, cached: int) -> Path:
    names = LIMITS[2 - version]
    (folder / names[0]).parent.mkdir(exist_ok=True)
    for name, text in zip(names, (limit, str(used), f"anon 5\n{names[3]} {cached}\n"), strict=False):
        (folder / name).write_text(f"{text}\n")
    return folder


def test_without_a_limit_it_is_that_of_the_machine(machine, tmp_path):
    assert available_bytes(tmp_path) == 64 * GB
    assert available_bytes(write(tmp_path, 2, "max", 5 * GB, 0)) == 64 * GB


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("limit", "used", "cached", "left"), [(40, 30, 0, 10), (40, 39, 20, 21), (10, 11, 0, 0), (200, 1, 0, 64)]
)
def test_a_container_may_have_less(machine, tmp_path, version, limit, used, cached, left):
    """What caches of files take is given up when it is needed."""
    assert available_bytes(write(tmp_path, version, str(limit * GB), used * GB, cached * GB)) == left * GB

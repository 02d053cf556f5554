"""Items from worker processes: the same as without workers, through pipes, errors as values."""

import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler

import psutil
import pytest
import torch
from torch.utils.data import Dataset

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.locks import locked
from diffsynth_core.training.workers import iterate


class Squares(Dataset):
    def __getitem__(self, place):
        if place == 5:
            raise DiffSynthError("five is damaged", "leave it out")
        return place, {"square": torch.full((3,), place**2), "text": "x" * place}


@pytest.mark.parametrize("workers", [0, 2])
def test_items_come_in_order_and_whole(workers):
    items = list(iterate(Squares(), [3, 1, 4], workers))
    assert [(place, item["square"].tolist(), item["text"]) for place, item in items] == [
        (place, [place**2] * 3, "x" * place) for place in (3, 1, 4)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_is_raised_as_it_was(workers):
    with pytest.raises(DiffSynthError, match="five is damaged"):
        list(iterate(Squares(), [1, 5], workers))


def test_no_tensor_goes_through_shared_memory(tmp_path, monkeypatch):
    """A container has 64 MB of it, and torch's workers hang if it is full."""
    share = ForkingPickler._extra_reducers[torch.Tensor]

    def spy(tensor):
        (tmp_path / "shared").touch()
        return share(tensor)

    monkeypatch.setitem(ForkingPickler._extra_reducers, torch.Tensor, spy)
    assert len(list(iterate(Squares(), [1, 2], 1))) == 2
    assert not (tmp_path / "shared").exists()


def test_no_room_for_what_workers_share_is_told():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as if /dev/shm was full
    try:
        with pytest.raises(DiffSynthError, match=r"cannot start 2 data workers: .*`/dev/shm`") as caught:
            next(iterate(Squares(), [1], 2))
        assert len(list(iterate(Squares(), [1], 0))) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "--dataset_num_workers 0" in caught.value.problems[0].hint


class Endless(Dataset):
    """Items that never finish loading, except for the first of each worker."""

    def __getitem__(self, place):
        if place >= 2:
            os.write(1, f"{os.getpid()}\n".encode())  # in one piece, for two workers share the pipe
            time.sleep(3600)
        return place


SCRIPT = """
import sys
from pathlib import Path
from diffsynth_core.locks import locked
from diffsynth_core.training.workers import iterate
from tests.unit.training.test_workers import Endless

with locked(Path(sys.argv[1])):
    items = iterate(Endless(), range(4), 2)
    print(next(items), flush=True)
    {then}
"""


@contextmanager
def at_work(folder, then):
    """A process with a lock, and its two workers, each loading an item."""
    command = [sys.executable, "-c", SCRIPT.format(then=then), folder / "lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            lines = sorted(int(process.stdout.readline()) for _ in range(3))  # the first item is 0
            yield process, [psutil.Process(number) for number in lines[1:]]
        finally:
            process.kill()


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed(tmp_path):
    with at_work(tmp_path, "next(items)") as (process, workers):
        process.kill()
        process.wait()
        with locked(tmp_path / "lock", lambda: pytest.fail("a worker holds the lock")):
            pass
        gone, alive = psutil.wait_procs(workers, timeout=10)
        assert (len(gone), alive) == (2, [])


@pytest.mark.slow
def test_workers_in_the_midst_of_an_item_are_ended_when_no_more_are_wanted(tmp_path):
    """They ignore SIGTERM, with which torch would end them."""
    with at_work(tmp_path, "sys.stdin.readline(); items.close()") as (process, workers):
        process.stdin.close()
        assert process.wait(timeout=60) == 0
        assert psutil.wait_procs(workers, timeout=10)[1] == []

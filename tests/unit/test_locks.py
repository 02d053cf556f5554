"""Lock files: held by one process, never by its children, never through a link."""

import os
import signal
import subprocess
import sys

import pytest

from diffsynth_core.checkpoints.run_folder import LOCK, claim_folder
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.locks import locked

HOLDING = """
import os, signal, sys, time
from pathlib import Path
from diffsynth_core.locks import locked

with locked(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    signal.pause()
"""


@pytest.fixture
def held(tmp_path):
    """A lock file, a process that holds it, and a child forked by this one."""
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLDING, path], stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        try:
            yield path, process
        finally:
            process.kill()
            os.kill(child, signal.SIGKILL)


def test_a_lock_ends_with_the_process_that_took_it_whatever_it_forked(held):
    path, process = held
    waited = []

    def waiting() -> None:
        waited.append(True)
        process.kill()

    with locked(path, waiting):
        assert waited == [True]


def test_giving_up_leaves_the_lock_with_the_other_process(held):
    path, _ = held

    def give_up() -> None:
        raise DiffSynthError("busy")

    for _ in range(2):
        with pytest.raises(DiffSynthError, match="busy"), locked(path, give_up):
            pytest.fail("it is held")


def test_a_lock_can_be_taken_again(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "lock", lambda: pytest.fail("nobody holds it")):
            pass


@pytest.mark.parametrize("kind", ["a link", "a link to nothing", "a folder", "not a regular file"])
def test_what_is_no_lock_file_is_told_and_left_alone(tmp_path, kind):
    precious, lock = tmp_path / "precious", tmp_path / LOCK
    precious.write_text("years of work")
    make = {
        "a link": lambda: lock.symlink_to(precious),
        "a link to nothing": lambda: lock.symlink_to(tmp_path / "nothing"),
        "a folder": lock.mkdir,
        "not a regular file": lambda: os.mkfifo(lock),
    }
    make[kind]()
    for take in (lambda: locked(lock), lambda: claim_folder(tmp_path)):
        reported = f"the lock file `{lock}` is {kind.removesuffix(' to nothing')}"
        with pytest.raises(DiffSynthError, match=reported), take():
            pytest.fail("it was taken")
    assert precious.read_text() == "years of work" and not (tmp_path / "nothing").exists()


def test_the_content_of_a_lock_file_stays(tmp_path):
    (tmp_path / LOCK).write_text("mine")
    (tmp_path / "run.json").write_text("{}")
    with claim_folder(tmp_path):
        pass
    assert (tmp_path / LOCK).read_text() == "mine"

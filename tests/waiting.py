"""Waiting for something to happen in another process: never for a time that is hoped to be long enough."""

import time
from collections.abc import Callable


def wait_until(happened: Callable[[], object], seconds: float = 120) -> None:
    """Wait until `happened` is true; a test fails after so many seconds."""
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, f"waited {seconds} s"
        time.sleep(0.02)


def alive(process: object) -> bool:
    """Whether a process still runs; a test fails at once when what it waits for can no longer come."""
    assert process.poll() is None, process.communicate()
    return True

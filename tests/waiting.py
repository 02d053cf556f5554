"""Waiting for a condition with a deadline, instead of sleeping for a time that may be too short."""

import time
from collections.abc import Callable


def wait_until(happened: Callable[[], object], seconds: float = 120) -> None:
    """Wait until `happened` returns a true value; fail after `seconds`."""
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, f"waited {seconds} s"
        time.sleep(0.02)


def alive(process: object) -> bool:
    """Return True; fail if the process has ended, because what the test waits for can no longer happen."""
    assert process.poll() is None, process.communicate()
    return True

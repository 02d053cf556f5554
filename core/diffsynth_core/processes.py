"""Child processes that end with their parent, however that ends. No torch."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

POLL_SECONDS = 1.0
"""Interval at which a process checks whether its parent still exists."""
_PR_SET_PDEATHSIG = 1
"""Option of Linux's `prctl`: the signal to receive when the parent ends."""


def end_with_parent(parent: int) -> None:
    """Have this process killed when its parent, the process `parent`, ends: it is of no use alone."""
    if _kernel_ends_with_parent():
        if os.getppid() != parent:  # the parent ended before prctl was called
            os._exit(1)
        return
    watch_parent(parent, lambda: os._exit(1))


def _kernel_ends_with_parent() -> bool:
    """Request the signal from Linux; return False if that is not possible.

    The kernel sends it when the *thread* that started this process ends.
    """
    if sys.platform != "linux":
        return False
    with suppress(OSError, AttributeError):
        return bool(ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) == 0)
    return False


def watch_parent(parent: int, gone: Callable[[], None]) -> None:
    """Call `gone` once, in a daemon thread, when `parent`, the parent of this process, has ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        gone()

    threading.Thread(target=watch, name="watch parent", daemon=True).start()

"""Processes that end with the one that started them, however that ends. No torch."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

LOOK_SECONDS = 1.0
"""How often a process looks whether the one that started it is still there."""
_PR_SET_PDEATHSIG = 1
"""Of Linux's `prctl`: the signal that a process gets when its parent is gone."""


def end_with_parent(parent: int) -> None:
    """Have this process, which `parent` started, killed when that one is gone: alone it is of no use to anybody."""
    if _kernel_ends_with_parent():
        if os.getppid() != parent:  # gone before the kernel was asked
            os._exit(1)
        return
    watch_parent(parent, lambda: os._exit(1))


def _kernel_ends_with_parent() -> bool:
    """Ask Linux for it; False where it cannot. It goes by the *thread* that started this process."""
    if sys.platform != "linux":
        return False
    with suppress(OSError, AttributeError):
        return bool(ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) == 0)
    return False


def watch_parent(parent: int, gone: Callable[[], None]) -> None:
    """Call `gone` in a thread of its own, once, when the process `parent`, which started this one, is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        gone()

    threading.Thread(target=watch, name="watch parent", daemon=True).start()

"""Commands that write files, stopped by a signal: partial files are removed, and the exit code names the signal."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from diffsynth_core.errors import STOPPING_SIGNALS, Interrupted


@contextmanager
def handle_sigint() -> Iterator[None]:
    """While the block runs, turn the first stop signal into an exception, so that files can be cleaned up.

    Later signals are ignored: cleaning up takes a moment. A signal that is already ignored (a program started with
    `nohup`) stays ignored.

    Raises:
        Interrupted: with the exit code of the signal.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for listened in before:
            signal.signal(listened, signal.SIG_IGN)
        raise Interrupted(number, f"interrupted by {signal.Signals(number).name}; nothing was written")

    handlers = {number: signal.getsignal(number) for number in STOPPING_SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

"""Commands that write files, stopped by a signal: what is half written goes, and the exit code tells the signal."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from diffsynth_core.errors import STOPPING_SIGNALS, Interrupted


@contextmanager
def handle_sigint() -> Iterator[None]:
    """While the block runs, the first signal that asks to stop ends it as an exception, which lets files be cleaned up.

    Further ones have no effect: cleaning up takes a moment. A signal that is ignored already (a program started with
    `nohup`) stays so.

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

"""Stopping on a signal: the step in work is finished and saved first."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from diffsynth_core.errors import Interrupted


class StopRequest:
    """Whether somebody asked the run to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def raise_if_set(self) -> None:
        """Raises: Interrupted: when a stop was asked for; for the work before the first step."""
        if self.signal_number is not None:
            raise Interrupted(
                self.signal_number,
                "stopped before the first step; what was encoded is kept",
                "start the same command again to go on",
            )


@contextmanager
def listen_for_stop() -> Iterator[StopRequest]:
    """While the block runs, SIGINT and SIGTERM ask to stop; a second one acts at once."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.signal_number = number
        signal.signal(number, previous[signal.Signals(number)] or signal.SIG_DFL)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

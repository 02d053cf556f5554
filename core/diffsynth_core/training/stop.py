"""Stopping on a signal: the step in work is finished and saved first."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from diffsynth_core.errors import STOPPING_SIGNALS, Interrupted

FINISHING = "Finishing the current step and saving; repeat the signal to stop at once"
"""What a signal leads to."""


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
                "interrupted before the first step; finished encodings are kept",
                "rerun the command to continue",
            )


@contextmanager
def listen_for_stop(tell: Callable[[str], None], second_signal_stops: bool = True) -> Iterator[StopRequest]:
    """While the block runs, stopping signals ask to stop; a second one acts at once.

    A signal that is ignored already (a program started with `nohup`) stays so.

    Args:
        tell: is given a message when the first signal comes.
        insist: False: further ones have no effect, as where a launcher sends them too.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request and not second_signal_stops:
            return
        request.signal_number = number
        tell(FINISHING)
        if second_signal_stops:
            signal.signal(number, previous[signal.Signals(number)] or signal.SIG_DFL)

    before = {number: signal.getsignal(number) for number in STOPPING_SIGNALS}
    previous = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in previous:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

"""Stopping on a signal, after the current step is finished and saved."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from diffsynth_core.errors import STOPPING_SIGNALS, Interrupted

FINISHING = "Finishing the current step and saving; repeat the signal to stop at once"
"""Message on the first signal."""


class StopRequest:
    """Whether a stop was requested, and by which signal."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def raise_if_set(self) -> None:
        """Stop before the first step.

        Raises:
            Interrupted: if a stop was requested.
        """
        if self.signal_number is not None:
            raise Interrupted(
                self.signal_number,
                "interrupted before the first step; finished encodings are kept",
                "rerun the command to continue",
            )


@contextmanager
def listen_for_stop(notify: Callable[[str], None], second_signal_stops: bool = True) -> Iterator[StopRequest]:
    """Turn stop signals into a request within the block; a second signal has its usual effect.

    Signals that were ignored before, as in a program started with `nohup`, stay ignored.

    Args:
        notify: called with a message on the first signal.
        second_signal_stops: False: further signals have no effect, as under a launcher that forwards them too.
    """
    request = StopRequest()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if request and not second_signal_stops:
            return
        request.signal_number = number
        notify(FINISHING)
        if second_signal_stops:
            signal.signal(number, previous[signal.Signals(number)] or signal.SIG_DFL)

    before = {number: signal.getsignal(number) for number in STOPPING_SIGNALS}
    previous = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

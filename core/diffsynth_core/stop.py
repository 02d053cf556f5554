"""Stopping on a signal or when the time is over, after the current step is finished and saved."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from diffsynth_core.errors import STOPPING_SIGNALS, Interrupted, OutOfTime

FINISHING = "Finishing the current step and saving; repeat the signal to stop at once"
"""Message on the first signal."""


class StopRequest:
    """Whether a stop was requested, by which signal, and when the time is over.

    Attributes:
        at_once: whether it was requested again, so that the end of the run waits for nothing.

    Signals reach all processes of a run; when the time is over, they have to agree about it, because each has its own
    clock.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.at_once = False
        self._deadline = math.inf

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def raise_if_set(self) -> None:
        """Stop before the first step.

        Raises:
            Interrupted: if a stop was requested.
        """
        if self.signal_number is not None:
            raise interrupted_before_first_step(self.signal_number)

    def limit_time(self, seconds: float) -> None:
        """Let the time be over so long from now."""
        self._deadline = time.monotonic() + seconds

    @property
    def limits_time(self) -> bool:
        """Whether the time is limited."""
        return self._deadline < math.inf

    @property
    def seconds_left(self) -> float:
        """Seconds until the time is over, negative afterwards; infinite without a limit."""
        return self._deadline - time.monotonic()

    def raise_if_out_of_time(self) -> None:
        """Stop before the first step.

        Raises:
            OutOfTime: if the time is over.
        """
        if self.seconds_left < 0:
            raise out_of_time_before_first_step()


def interrupted_before_first_step(signal_number: int) -> Interrupted:
    """The error of a process that this signal, to it or another one of the run, has reached before the first step."""
    return Interrupted(
        signal_number,
        "interrupted before the first step; finished encodings are kept",
        "rerun the command to continue",
    )


def out_of_time_before_first_step() -> OutOfTime:
    """The error of all processes of a run when the time of one is over before the first step."""
    return OutOfTime(
        "stopped before the first step because of `--max_time`; finished encodings are kept",
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

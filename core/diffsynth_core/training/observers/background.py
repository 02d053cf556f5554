"""What is brought to other places while a run goes on: in a thread, so that no step waits for a network."""

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from diffsynth_core.progress import Reporter, format_duration
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.observers.observer import Observer
from diffsynth_core.training.pace import Pace

WAIT_SECONDS = 600.0
"""How long the end of a run waits for its last updates, unless the slowest so far has taken more than half of that."""
WAIT_SECONDS_ALONE = 15.0
"""How long it waits after a failure in one of several processes: the others notice it, and end all in half a minute."""
WAIT_SECONDS_AT_ONCE = 1.0
"""How long it waits if the user has asked twice to stop."""


class Destination(Protocol):
    """A place that holds what a run has saved."""

    @property
    def title(self) -> str:
        """Its name in messages."""

    @property
    def by_hand(self) -> str:
        """How to do what is left to do without the run, as a hint."""

    def update(self) -> None:
        """Bring over all that is new since the last update; called in the thread. Anything it raises is an outage."""


class Background:
    """Updates a destination in a daemon thread.

    At most one update is due: whatever is saved meanwhile, the next one brings it over.

    Attributes:
        slowest: seconds of the slowest update so far.
    """

    def __init__(self, destination: Destination) -> None:
        self.destination = destination
        self.slowest = 0.0
        self._due = self._updating = self._failed = self._closed = False
        self._outages: deque[str | None] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def request(self) -> None:
        """Have the destination updated; returns at once."""
        with self._changed:
            self._due = True
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="background updates", daemon=True)
                self._thread.start()

    def outages(self) -> list[str | None]:
        """Return, for each time that updates have begun to fail since the last call, the reason; None where they have
        worked again.
        """
        return [self._outages.popleft() for _ in range(len(self._outages))]

    def wait(self, seconds: float) -> bool:
        """Wait until nothing is due, at most so long; return whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._due or self._updating), seconds)

    @property
    def unfinished(self) -> bool:
        """Whether the destination lacks something, because an update is due or the last one failed."""
        with self._changed:
            return self._due or self._updating or self._failed

    def close(self) -> None:
        """End the thread, after the update that it may be at."""
        with self._changed:
            self._due, self._closed = False, True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due or self._closed)
                if self._closed:
                    return
                self._due, self._updating = False, True
            reason = self._update()
            with self._changed:
                if (reason is not None) != self._failed:
                    self._outages.append(reason)
                self._failed, self._updating = reason is not None, False
                self._changed.notify_all()

    def _update(self) -> str | None:
        """Return why an update failed; None if it has not."""
        begun = time.monotonic()
        try:
            self.destination.update()
        except Exception as error:  # whatever a file system or a hub raises: none may end a run
            return " ".join(str(error).split()) or type(error).__name__
        self.slowest = max(self.slowest, time.monotonic() - begun)
        return None


class BackgroundObserver(Observer):
    """Has destinations updated after each save, and waits for them at the end of the run.

    Each has a thread of its own: one that hangs delays no other. One that fails is reported once, and tried again with
    the next save.
    """

    def __init__(
        self,
        after_saves: list[Destination],
        after_checkpoints: list[Destination],
        reporter: Reporter,
        pace: Pace,
        stop: StopRequest,
        is_alone: Callable[[], bool],
    ) -> None:
        """Those in `after_saves` are updated after whatever is saved, and after the first step: not before it, as the
        processes that read data, which are forked for it, would inherit open files and connections.

        Args:
            is_alone: whether other processes of the run may have ended, at its end.
        """
        self._after_saves = [Background(destination) for destination in after_saves]
        self._after_checkpoints = [Background(destination) for destination in after_checkpoints]
        self._all = [*self._after_checkpoints, *self._after_saves]
        self._reporter, self._pace, self._stop, self._is_alone = reporter, pace, stop, is_alone
        self._begun = False

    def on_step(self, report: object) -> None:
        if not self._begun:
            self._begun = True
            _request(self._after_saves)
        self._tell()
        self._pace.update_seconds = self._slowest

    def on_save(self, path: Path, step: int) -> None:
        _request(self._all)

    def on_state(self, path: Path, step: int) -> None:
        _request(self._after_saves)

    def on_preview(self, folder: Path, step: int) -> None:
        _request(self._after_saves)

    def on_end(self) -> None:
        _request(self._all)
        seconds = max(WAIT_SECONDS, 2 * self._slowest)
        if self._stop.limits_time:
            seconds = min(seconds, max(self._stop.seconds_left, 0.0))
        if self._is_alone():
            seconds = min(seconds, WAIT_SECONDS_ALONE)
        if self._stop.at_once:
            seconds = min(seconds, WAIT_SECONDS_AT_ONCE)
        silent = min(seconds, 1.0)
        if not self.wait(silent) and seconds > silent:
            titles = " and ".join(each.destination.title for each in self._all)
            self._reporter.info(f"Waiting for {titles}, at most {format_duration(seconds)}")
            self.wait(seconds - silent)
        self._tell()
        for each in self._all:
            if each.unfinished:
                self._reporter.warn(f"{each.destination.title} lacks what was saved last; {each.destination.by_hand}")
            each.close()

    def wait(self, seconds: float) -> bool:
        """Wait until nothing is due, at most so long; return whether that is so."""
        end = time.monotonic() + seconds
        return all(each.wait(max(end - time.monotonic(), 0.0)) for each in self._all)

    @property
    def _slowest(self) -> float:
        return max(each.slowest for each in self._all)

    def _tell(self) -> None:
        for each in self._all:
            for reason in each.outages():
                if reason is None:
                    self._reporter.info(f"Updated {each.destination.title} after an outage")
                else:
                    what = f"{each.destination.title} cannot be updated: {reason}"
                    self._reporter.warn(f"{what}; the run continues, and tries again with the next save")


def _request(destinations: list[Background]) -> None:
    for each in destinations:
        each.request()

"""What is brought to other places while a run goes on: in a thread, so that no step waits for a network."""

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from diffsynth_core.progress import Reporter, format_duration
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.observers import Observer
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
    """Updates destinations one after the other in a daemon thread.

    At most one update of each is due: whatever is saved meanwhile, the next one brings it over.

    Attributes:
        slowest: seconds of the slowest update so far.
    """

    def __init__(self) -> None:
        self.slowest = 0.0
        self._due: dict[Destination, None] = {}
        self._now: Destination | None = None
        self._failed: dict[Destination, str] = {}
        self._outages: deque[tuple[Destination, str | None]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def request(self, destination: Destination) -> None:
        """Have a destination updated; returns at once."""
        with self._changed:
            self._due[destination] = None
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="background updates", daemon=True)
                self._thread.start()

    def outages(self) -> list[tuple[Destination, str | None]]:
        """Return the destinations whose updates have begun to fail since the last call, with the reason, or work again
        (None).
        """
        return [self._outages.popleft() for _ in range(len(self._outages))]

    def wait(self, seconds: float) -> bool:
        """Wait until nothing is due, at most so long; return whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._due and self._now is None, seconds)

    def unfinished(self, destination: Destination) -> bool:
        """Return whether a destination lacks something, because an update is due or the last one failed."""
        with self._changed:
            return destination in self._due or destination is self._now or destination in self._failed

    def close(self) -> None:
        """End the thread, after the update that it may be at."""
        with self._changed:
            self._due.clear()
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._due) or self._closed)
                if self._closed:
                    return
                self._now = destination = next(iter(self._due))
                del self._due[destination]
            reason = self._update(destination)
            with self._changed:
                if (reason is None) == (destination in self._failed):
                    self._outages.append((destination, reason))
                if reason is None:
                    self._failed.pop(destination, None)
                else:
                    self._failed[destination] = reason
                self._now = None
                self._changed.notify_all()

    def _update(self, destination: Destination) -> str | None:
        """Return why an update failed; None if it has not."""
        begun = time.monotonic()
        try:
            destination.update()
        except Exception as error:  # whatever a file system or a hub raises: none may end a run
            return " ".join(str(error).split()) or type(error).__name__
        self.slowest = max(self.slowest, time.monotonic() - begun)
        return None


class BackgroundObserver(Observer):
    """Has destinations updated after each save, and waits for them at the end of the run.

    One that fails is reported once, and tried again with the next save.
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
        """Begin with those in `after_saves`, which are updated after whatever is saved.

        Args:
            is_alone: whether other processes of the run may have ended, at its end.
        """
        self._after_saves, self._after_checkpoints = after_saves, after_checkpoints
        self._reporter, self._pace, self._stop, self._is_alone = reporter, pace, stop, is_alone
        self._background = Background()
        self._request(after_saves)

    def on_step(self, report: object) -> None:
        self._tell()
        self._pace.update_seconds = self._background.slowest

    def on_save(self, path: Path, step: int) -> None:
        self._request([*self._after_checkpoints, *self._after_saves])

    def on_state(self, path: Path, step: int) -> None:
        self._request(self._after_saves)

    def on_preview(self, folder: Path, step: int) -> None:
        self._request(self._after_saves)

    def on_end(self) -> None:
        destinations = [*self._after_checkpoints, *self._after_saves]
        self._request(destinations)
        seconds = max(WAIT_SECONDS, 2 * self._background.slowest)
        if self._stop.limits_time:
            seconds = min(seconds, max(self._stop.seconds_left, 0.0))
        if self._is_alone():
            seconds = min(seconds, WAIT_SECONDS_ALONE)
        if self._stop.at_once:
            seconds = min(seconds, WAIT_SECONDS_AT_ONCE)
        silent = min(seconds, 1.0)
        if not self._background.wait(silent) and seconds > silent:
            titles = " and ".join(destination.title for destination in destinations)
            self._reporter.info(f"Waiting for {titles}, at most {format_duration(seconds)}")
            self._background.wait(seconds - silent)
        self._tell()
        for destination in destinations:
            if self._background.unfinished(destination):
                self._reporter.warn(f"{destination.title} lacks what was saved last; {destination.by_hand}")
        self._background.close()

    def _request(self, destinations: list[Destination]) -> None:
        for destination in destinations:
            self._background.request(destination)

    def _tell(self) -> None:
        for destination, reason in self._background.outages():
            if reason is None:
                self._reporter.info(f"Updated {destination.title} after an outage")
            else:
                what = f"{destination.title} cannot be updated: {reason}"
                self._reporter.warn(f"{what}; the run continues, and tries again with the next save")

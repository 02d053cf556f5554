"""What is brought elsewhere in threads."""

import threading
from types import SimpleNamespace

import pytest

from diffsynth_core.stop import StopRequest
from diffsynth_core.training.observers import background
from diffsynth_core.training.observers.background import BackgroundObserver, Destination
from tests.waiting import wait_until


class Counted(Destination):
    """A destination whose updates are counted, and wait for `free`."""

    title, by_hand = "the place", "copy it"

    def __init__(self) -> None:
        self.updates, self.free = 0, threading.Event()

    def update(self) -> None:
        self.updates += 1
        assert self.free.wait(60)


@pytest.fixture
def observe():
    """Make an observer of what is updated after each save, and what after each checkpoint."""
    made: list[Counted] = []

    def observer(saves: Counted, checkpoints: Counted) -> BackgroundObserver:
        made.extend((saves, checkpoints))
        told = SimpleNamespace(info=lambda _: None, warn=lambda _: None)
        pace = SimpleNamespace(update_seconds=0.0)
        return BackgroundObserver([saves], [checkpoints], told, pace, StopRequest(), lambda: False)

    yield observer
    for each in made:
        each.free.set()


def test_a_destination_that_hangs_delays_no_other(observe, monkeypatch, tmp_path):
    monkeypatch.setattr(background, "WAIT_SECONDS", 1.0)
    mirror, hub = Counted(), Counted()
    mirror.free.set()
    observer = observe(mirror, hub)
    for step in (1, 2):
        observer.on_save(tmp_path, step)
        observer._after_saves[0].wait(60)
        assert mirror.updates == step
    wait_until(lambda: hub.updates == 1)  # in a thread of its own
    observer.on_end()
    assert (mirror.updates, hub.updates) == (3, 1) and not observer._after_saves[0].unfinished


def test_nothing_is_updated_before_the_first_step(observe):
    """It forks the processes that read data, which would inherit open files and connections."""
    mirror, hub = Counted(), Counted()
    mirror.free.set()
    observer = observe(mirror, hub)
    assert observer.wait(60) and mirror.updates == 0
    for _ in range(2):
        observer.on_step(None)
        assert observer.wait(60)
    assert (mirror.updates, hub.updates) == (1, 0)

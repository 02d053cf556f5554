"""What a run measures of itself decides whether another step ends in time."""

import pytest

from diffsynth_core.planning.memory.disk import SaveSeconds
from diffsynth_core.training import pace
from diffsynth_core.training.pace import Pace


@pytest.fixture
def clock(monkeypatch):
    """A clock that is advanced by hand."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(pace.time, "monotonic", lambda: Clock.now)
    return Clock


@pytest.fixture
def paced(clock):
    """Steps of 5 and 3 seconds, a third that has taken 1 so far; no save yet."""
    paced = Pace(SaveSeconds(checkpoint=2, state=6))
    for seconds in (5, 3):
        paced.begin_step()
        clock.now += seconds
        paced.end_step()
    paced.begin_step()
    clock.now += 1
    return paced


def test_another_step_needs_two_of_the_slowest_and_a_save(paced, clock):
    assert paced.allows_another(10 + 8, saves=1)
    assert not paced.allows_another(10 + 7.9, saves=1)
    assert not paced.allows_another(10 + 8, saves=2)
    clock.now += 6  # the third is the slowest now
    assert not paced.allows_another(10 + 8, saves=1)
    assert paced.allows_another(14 + 8, saves=1)


def test_the_slowest_save_replaces_what_was_assumed_of_its_kind(paced, clock):
    for seconds in (1, 0.5):
        with paced.writing_checkpoint():
            clock.now += seconds
    assert paced.save_seconds == 1 + 6
    with paced.writing_state():
        clock.now += 20
    assert paced.save_seconds == 1 + 20


def test_between_steps_another_one_with_one_to_spare_a_validation_and_a_save_lead_to_the_end(paced, clock):
    with paced.validating():
        clock.now += 4
    paced.update_seconds = 3
    assert paced.seconds_to_end(another_step=True, validates=True) == 2 * 5 + 4 + 8 + 3
    assert paced.seconds_to_end(another_step=True, validates=False) == 2 * 5 + 8 + 3
    assert paced.seconds_to_end(another_step=False, validates=True) == 3


def test_a_save_that_fails_measures_nothing(paced, clock):
    with pytest.raises(OSError, match="full"), paced.writing_state():
        clock.now += 0.1
        raise OSError("full")
    assert paced.save_seconds == 8

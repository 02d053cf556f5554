"""Machines that meet before they start processes, each played by a thread."""

import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest

from diffsynth_cli import rendezvous as meeting
from diffsynth_cli.rendezvous import Rendezvous, errors_sent, tell_complete, wait_for_machines
from diffsynth_core.errors import DiffSynthError


@pytest.fixture
def first() -> Rendezvous:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return Rendezvous(address="127.0.0.1", port=found.getsockname()[1], machines=2, rank=0)


def fail(rendezvous: Rendezvous) -> None:
    with errors_sent(rendezvous):
        raise ZeroDivisionError("of its own")


def run(first: Rendezvous, *machines: Callable[[Rendezvous], object]) -> list["Future[object]"]:
    """Run what each machine does, by rank; return how it ended."""
    with ThreadPoolExecutor() as threads:
        places = [replace(first, rank=rank, machines=len(machines)) for rank in range(len(machines))]
        return [threads.submit(machine, place) for machine, place in zip(machines, places, strict=True)]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_machines_meet_at_both_kinds_of_addresses(first, address, monkeypatch):
    monkeypatch.setattr(meeting, "WAIT_SECONDS", 60)  # less than the limit of a test
    if address == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    ended = run(replace(first, address=address), *[wait_for_machines] * 3)
    assert [one.result() for one in ended] == [True, True, True]


@pytest.mark.parametrize("failed", [0, 1])
def test_a_machine_that_plans_for_long_is_told_that_another_has_failed_unexpectedly(first, failed, monkeypatch):
    """A minute takes a second. What is told beyond 20 s, as once was the limit, is told."""
    clock = SimpleNamespace(monotonic=lambda: 60 * time.monotonic(), sleep=time.sleep)
    monkeypatch.setattr(meeting, "time", clock)

    def plan_for_a_minute(rendezvous: Rendezvous) -> bool:
        time.sleep(1)
        return wait_for_machines(rendezvous)

    machines = [plan_for_a_minute, plan_for_a_minute]
    machines[failed] = fail
    ended = run(first, *machines)
    assert isinstance(ended[failed].exception(), ZeroDivisionError)
    error = ended[1 - failed].exception()
    assert isinstance(error, DiffSynthError)
    assert str(error) == f"machine {failed} of 2 cannot start: ZeroDivisionError: of its own"


def test_machines_that_wait_are_told_at_once_and_those_that_plan_when_they_come(first):
    told: list[float] = []

    def wait(rendezvous: Rendezvous) -> None:
        try:
            wait_for_machines(rendezvous)
        finally:
            told.append(time.monotonic())

    def plan(rendezvous: Rendezvous) -> None:
        time.sleep(2)
        wait_for_machines(rendezvous)

    begun = time.monotonic()
    ended = run(first, wait_for_machines, wait, fail, plan)
    assert told[0] - begun < 2
    for rank in (0, 1, 3):
        assert "machine 2 of 4" in str(ended[rank].exception())


@pytest.mark.parametrize("other", [wait_for_machines, tell_complete], ids=["without the run", "with the run"])
def test_a_run_that_is_complete_is_no_failure(first, other):
    for one in run(first, tell_complete, other):
        assert not one.result()


def test_a_complete_run_of_another_machine_is_not_that_of_the_first(first):
    ended = run(first, wait_for_machines, tell_complete)
    assert {str(one.exception()) for one in ended} == {
        "machine 1 of 2 cannot start: the run in its output folder is complete"
    }


def test_ctrl_c_ends_the_waiting_and_not_the_error(first, monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(meeting, "_serve", interrupted)
    with pytest.raises(ZeroDivisionError):
        fail(first)
    tell_complete(first)
    shown = capsys.readouterr().err
    assert "ZeroDivisionError: of its own" in shown and "Ctrl-C" in shown

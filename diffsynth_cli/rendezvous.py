"""Several machines wait for each other before they start processes, so that all end at once if one of them cannot.

The rendezvous of PyTorch, which follows, would wait ten minutes for the processes of such a machine.
"""

import json
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from diffsynth_cli.printing import echo
from diffsynth_core.errors import DiffSynthError

WAIT_SECONDS = 600.0
"""How long machines wait for each other: they are started by hand or by a scheduler."""
NOTIFY_SECONDS = 20.0
"""How long a machine that cannot start waits for others to connect, to notify them."""
RECEIVE_SECONDS = 5.0
"""How long a machine that has connected may take to send its message."""
POLL_SECONDS = 0.2
MAX_MESSAGE_BYTES = 2**16


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """The address of the first machine, where all meet; how many they are, and the rank of this one."""

    address: str
    port: int
    machines: int
    rank: int


def wait_for_machines(rendezvous: Rendezvous) -> None:
    """Wait until all machines are ready to start their processes.

    Raises:
        DiffSynthError: on all machines, if one of them cannot start, or does not connect within `WAIT_SECONDS`.
    """
    failures = _serve(rendezvous, {}) if rendezvous.rank == 0 else _connect(rendezvous, {})
    if failures:
        rank, reason = min(failures.items())
        what = f"machine {rank} of {rendezvous.machines} cannot start: {reason}"
        raise DiffSynthError(what, "fix that, and start all machines again")


@contextmanager
def errors_sent(rendezvous: Rendezvous | None) -> Iterator[None]:
    """Context for what may fail before this machine starts processes, of which the others are notified; None: there
    are no others.
    """
    try:
        yield
    except DiffSynthError as error:
        if rendezvous:
            notify(rendezvous, error.problems[0].message)
        raise


def notify(rendezvous: Rendezvous, reason: str) -> None:
    """Notify the other machines that this one cannot start, as far as they connect within `NOTIFY_SECONDS`."""
    failures = {rendezvous.rank: reason}
    echo(f"Notifying the other machines that this one cannot start, for up to {NOTIFY_SECONDS:.0f} s", err=True)
    with suppress(DiffSynthError):
        _serve(rendezvous, failures) if rendezvous.rank == 0 else _connect(rendezvous, failures)


def _serve(rendezvous: Rendezvous, failures: Mapping[int, str]) -> Mapping[int, str]:
    """Receive a message of each other machine, send all the failures of all, and return them by rank."""
    found, connected = dict(failures), {0}
    until = time.monotonic() + (NOTIFY_SECONDS if found else WAIT_SECONDS)
    with _listen(rendezvous) as server, ExitStack() as opened:
        connections: list[socket.socket] = []
        while len(connected) < rendezvous.machines and time.monotonic() < until:
            try:
                connection = opened.enter_context(server.accept()[0])
                connection.settimeout(RECEIVE_SECONDS)
                rank, reason = _receive(connection)
            except (OSError, ValueError, TypeError):  # nothing for a while, or not from a machine of the run
                continue
            connected.add(rank)
            connections.append(connection)
            if reason:
                found[rank] = reason
                until = min(until, time.monotonic() + NOTIFY_SECONDS)
        if not found:
            missing = [rank for rank in range(rendezvous.machines) if rank not in connected]
            found = dict.fromkeys(missing, f"it did not connect to `{rendezvous.address}:{rendezvous.port}`")
        for connection in connections:
            with suppress(OSError):
                _send(connection, list(found.items()))
    return found


def _connect(rendezvous: Rendezvous, failures: Mapping[int, str]) -> Mapping[int, str]:
    """Send the first machine the failure of this one, if any, and return the failures of all by rank."""
    until = time.monotonic() + (NOTIFY_SECONDS if failures else WAIT_SECONDS)
    address = (rendezvous.address, rendezvous.port)
    while time.monotonic() < until:
        with suppress(OSError, ValueError, TypeError), socket.create_connection(address, RECEIVE_SECONDS) as first:
            _send(first, [rendezvous.rank, failures.get(rendezvous.rank)])
            if failures:
                return failures
            first.settimeout(WAIT_SECONDS + NOTIFY_SECONDS)
            return dict(_receive(first))
        time.sleep(POLL_SECONDS)
    return {0: f"it did not listen at `{rendezvous.address}:{rendezvous.port}`"}


@contextmanager
def _listen(rendezvous: Rendezvous) -> Iterator[socket.socket]:
    try:
        server = socket.create_server(("", rendezvous.port))
    except OSError as error:
        what = f"machine 0 cannot listen at port {rendezvous.port}: {error.strerror}"
        raise DiffSynthError(what, "pass another `--main_process_port` on all machines") from error
    with server:
        server.settimeout(POLL_SECONDS)
        yield server


def _send(connection: socket.socket, message: object) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> Any:
    """Return a message.

    Raises:
        ValueError: if it is not one.
    """
    with connection.makefile("rb") as lines:
        return json.loads(lines.readline(MAX_MESSAGE_BYTES))

"""Several machines wait for each other before they start processes, so that all end at once if one of them cannot.

The rendezvous of PyTorch, which follows, would wait ten minutes for the processes of such a machine.
"""

import json
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import astuple, dataclass, field
from typing import Any

from diffsynth_cli.printing import echo
from diffsynth_core.errors import DiffSynthError, truncate

WAIT_SECONDS = 600.0
"""How long machines wait for each other: they are started by hand or by a scheduler, and download and plan first."""
RECEIVE_SECONDS = 5.0
"""How long a machine that has connected may take to send its report."""
POLL_SECONDS = 0.2
MAX_MESSAGE_BYTES = 2**16
MAX_REASON = 1000
"""Maximum length of a reason in characters."""


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """The address of the first machine, where all meet; how many they are, and the rank of this one."""

    address: str
    port: int
    machines: int
    rank: int


@dataclass(frozen=True)
class Report:
    """What a machine tells the others: the `reason` why it does not start processes, if there is one.

    `is_complete`: because nothing is left to do.
    """

    reason: str | None = None
    is_complete: bool = False


READY = Report()
COMPLETE = Report("the run in its output folder is complete", is_complete=True)


@dataclass(frozen=True)
class Answer:
    """What all machines learn. Whether the run is complete is for the first one to say, whose folder has the run.

    `reasons`: by rank, why machines cannot start; empty for a complete run.
    """

    is_complete: bool = False
    reasons: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def to(cls, reports: Mapping[int, Report]) -> "Answer":
        """The answer to reports by rank, that of the first machine among them."""
        if reports[0].is_complete:
            return cls(is_complete=True)
        return cls(reasons={rank: report.reason for rank, report in reports.items() if report.reason})

    def describe(self, machines: int) -> str:
        """State which machine cannot start, and why."""
        rank, reason = min(self.reasons.items())
        return f"machine {rank} of {machines} cannot start: {reason}"


def wait_for_machines(rendezvous: Rendezvous) -> bool:
    """Wait until all machines are ready to start their processes.

    Returns:
        Whether to start them; False: the run of the first machine is complete.

    Raises:
        DiffSynthError: on all machines, if one of them cannot start, or does not connect within `WAIT_SECONDS`.
    """
    answer = _exchange(rendezvous, READY)
    _raise_if_refused(rendezvous, answer)
    return not answer.is_complete


def tell_complete(rendezvous: Rendezvous) -> None:
    """Tell the other machines, as far as they connect within `WAIT_SECONDS`, that the run here is complete.

    Raises:
        DiffSynthError: if the first machine is to continue it, or cannot start.
    """
    echo(_waiting("tell the other machines that nothing is left to do"), err=True)
    answer = Answer()
    with suppress(KeyboardInterrupt):
        answer = _exchange(rendezvous, COMPLETE)
    _raise_if_refused(rendezvous, answer)


@contextmanager
def errors_sent(rendezvous: Rendezvous | None) -> Iterator[None]:
    """Context for what may fail before this machine starts processes, which the others are told as far as they connect
    within `WAIT_SECONDS`; None: there are no others.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if rendezvous:
            _tell_failure(rendezvous, _reason(error))
        raise


def _reason(error: BaseException) -> str:
    if isinstance(error, DiffSynthError):
        return error.problems[0].message
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _tell_failure(rendezvous: Rendezvous, reason: str) -> None:
    short = truncate(" ".join(reason.split()), MAX_REASON)
    echo(f"This machine cannot start: {short}", err=True)
    echo(_waiting("tell the other machines"), err=True)
    # Whatever the others report, and if this one cannot listen: the error that is on its way says more.
    with suppress(DiffSynthError, KeyboardInterrupt):
        _exchange(rendezvous, Report(short))


def _waiting(purpose: str) -> str:
    return f"Waiting to {purpose}, for up to {WAIT_SECONDS / 60:.0f} minutes; Ctrl-C ends that"


def _raise_if_refused(rendezvous: Rendezvous, answer: Answer) -> None:
    if answer.reasons:
        raise DiffSynthError(answer.describe(rendezvous.machines), "fix that, and start all machines again")


def _exchange(rendezvous: Rendezvous, own: Report) -> Answer:
    """Report to the first machine, or receive the reports of the others there, and return its answer.

    Machines that do not appear are refused only by one that is ready: the others start nothing anyway.
    """
    return _serve(rendezvous, own) if rendezvous.rank == 0 else _connect(rendezvous, own)


def _serve(rendezvous: Rendezvous, own: Report) -> Answer:
    """Receive a report of each other machine, and answer all once it is known whether they start."""
    reports = {0: own}
    answer = Answer.to(reports)
    until = time.monotonic() + WAIT_SECONDS
    with _listen(rendezvous) as server, ExitStack() as opened:
        waiting: list[socket.socket] = []
        while (missing := set(range(rendezvous.machines)) - reports.keys()) and time.monotonic() < until:
            try:
                connection = opened.enter_context(server.accept()[0])
                connection.settimeout(RECEIVE_SECONDS)
                rank, *report = _receive(connection)
                reports[rank] = Report(*report)
            except (OSError, ValueError, TypeError):  # nothing for a while, or not from a machine of the run
                continue
            waiting.append(connection)
            was_known, answer = answer != Answer(), Answer.to(reports)
            if answer != Answer():
                _send_to_all(waiting, answer)
                waiting.clear()
                if not was_known and missing - {rank}:
                    echo(answer.describe(rendezvous.machines), err=True)
                    echo(_waiting("tell the other machines"), err=True)
        if missing and answer == Answer():
            reason = f"it did not connect to `{rendezvous.address}:{rendezvous.port}`"
            answer = Answer(reasons=dict.fromkeys(missing, reason))
        _send_to_all(waiting, answer)
    return answer


def _send_to_all(connections: list[socket.socket], answer: Answer) -> None:
    for connection in connections:
        with suppress(OSError):
            _send(connection, [answer.is_complete, list(answer.reasons.items())])


def _connect(rendezvous: Rendezvous, own: Report) -> Answer:
    """Send the first machine the report of this one, and return its answer."""
    until = time.monotonic() + WAIT_SECONDS
    address = (rendezvous.address, rendezvous.port)
    while time.monotonic() < until:
        with suppress(OSError, ValueError, TypeError), socket.create_connection(address, RECEIVE_SECONDS) as first:
            _send(first, [rendezvous.rank, *astuple(own)])
            first.settimeout(WAIT_SECONDS + 2 * RECEIVE_SECONDS)  # it waits for as long, and receives one at a time
            is_complete, reasons = _receive(first)
            return Answer(is_complete, dict(reasons))
        time.sleep(POLL_SECONDS)
    reason = f"it did not listen at `{rendezvous.address}:{rendezvous.port}`"
    return Answer(reasons={} if own.reason else {0: reason})


@contextmanager
def _listen(rendezvous: Rendezvous) -> Iterator[socket.socket]:
    """Listen at all addresses of this machine, of both versions of IP where it has both."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", rendezvous.port), family=family, dualstack_ipv6=both)
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

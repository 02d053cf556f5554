"""The processes ("ranks") of one run: none outlives the others, and together they report once.

Each reports how it ended to our launcher, which prints it once. If one has died, the others cannot continue: the
collective they wait in never completes.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import psutil

from diffsynth_cli import REPORTS
from diffsynth_cli.errors import Ending
from diffsynth_cli.printing import printable_text
from diffsynth_core.errors import EXIT_FAILED, EXIT_WRONG_USE, DiffSynthError, Problem
from diffsynth_core.files import LineFile
from diffsynth_core.processes import POLL_SECONDS, watch_parent

LAUNCHER = "launcher"
"""The name under which the launcher itself reports."""
PEER_LOST = 76
"""Exit code of a process that could not continue because another one died, which is the cause."""
ALONE_SECONDS = 15.0
"""How long a process may take to end by itself after another one died; some collectives wait forever."""
NOTICE_SECONDS = 5.0
"""A connection can break this long before the system shows that the process at its other end has died."""


class PeerLost(DiffSynthError):
    """Another process of the run has died."""

    exit_code = PEER_LOST


@contextmanager
def in_company() -> Iterator[None]:
    """Context for the body of each process of a run: stop and save if the launcher is gone, and end if another process
    has died, without reporting the collectives that failed because of it. Without our launcher or torch's, this does
    nothing: another parent process, such as a shell, may exit.

    Raises:
        PeerLost: in place of the error of such a collective.
    """
    if REPORTS not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    _report_begin()
    watch_parent(os.getppid(), lambda: os.kill(os.getpid(), signal.SIGTERM))
    peers = _Peers()
    try:
        yield
    except DiffSynthError:
        raise
    except (RuntimeError, OSError) as error:  # what a collective raises when its connections break
        lost = peers.wait_for_loss()
        if not lost and peers.are_elsewhere and _is_of_connection(error):
            raise PeerLost("a process on another machine has died", "continue with `--resume auto`") from error
        if not lost:
            raise
        raise PeerLost(f"{_name(lost[0], peers.world_size)} has died", "continue with `--resume auto`") from error
    finally:
        peers.let_go()


class _Peers:
    """The other processes that the launcher started on this machine."""

    def __init__(self) -> None:
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._count = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size)) - 1
        self._known: dict[int, psutil.Process] = {}
        self._done = threading.Event()
        if self._count > 0:
            threading.Thread(target=self._watch, name="watch peers", daemon=True).start()

    @property
    def are_elsewhere(self) -> bool:
        """Whether some of the processes run on other machines, where nobody here sees them die."""
        return self.world_size > self._count + 1

    def wait_for_loss(self) -> list[int]:
        """The ranks that have died; none if all stay alive for a while."""
        until = time.monotonic() + NOTICE_SECONDS
        while self._count > 0 and time.monotonic() < until:
            if lost := self._lost():
                return lost
            time.sleep(0.1)
        return []

    def let_go(self) -> None:
        """After this, other processes may end as they like."""
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            if self._lost():
                break
        if not self._done.wait(ALONE_SECONDS):
            os._exit(PEER_LOST)

    def _lost(self) -> list[int]:
        if len(self._known) < self._count:
            self._known |= _started_beside_us()
        return [rank for rank, process in self._known.items() if not _is_alive(process)]


def _is_of_connection(error: Exception) -> bool:
    """Whether a collective failed because a process at the other end of a connection is gone. Only messages tell."""
    return any(word in str(error) for word in ("gloo", "NCCL", "TCPStore", "Connection"))


def _started_beside_us() -> dict[int, psutil.Process]:
    """The other processes of the same launcher, by rank."""
    found = {}
    with suppress(psutil.Error):
        for process in psutil.Process(os.getppid()).children():
            with suppress(psutil.Error, ValueError):
                if process.pid != os.getpid() and (rank := process.environ().get("RANK")):
                    found[int(rank)] = process
    return found


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _report_begin() -> None:
    """Report the rank of this process to our launcher, if it started this process."""
    if REPORTS in os.environ:
        _report_file("pid").write_text(str(os.getpid()), encoding="utf-8")


def report_log(path: Path) -> None:
    """Report the log file of the run to our launcher, if it started this process."""
    if REPORTS in os.environ:
        with suppress(OSError):
            _report_file("log").write_text(str(path.absolute()), encoding="utf-8")


def _report_file(kind: str) -> Path:
    return Path(os.environ[REPORTS]) / f"rank-{os.environ.get('RANK', '0')}.{kind}"


def report_ending(ending: Ending) -> bool:
    """Report how this process ended to our launcher; False if none started it, or if it is gone."""
    if REPORTS not in os.environ:
        return False
    return write_ending(_report_file("json"), ending)


def write_ending(path: Path, ending: Ending) -> bool:
    """Write an ending for the launcher to read; False if that fails."""
    try:
        path.write_text(json.dumps(asdict(ending)), encoding="utf-8")
    except OSError:
        return False
    return True


def read_endings(reports: Path) -> dict[str, Ending]:
    """The reports, by `rank-N` or `launcher`; a partial report of a killed process is ignored."""
    found = {}
    for path in sorted(reports.glob("*.json")):
        with suppress(ValueError, TypeError, KeyError):
            content = json.loads(path.read_text(encoding="utf-8"))
            problems = tuple(Problem(**problem) for problem in content.pop("problems"))
            found[path.stem] = Ending(problems=problems, **content)
    return found


def keep_in_log(ending: Ending, reports: Path) -> None:
    """Write how a run ended to its log, if the process that writes the log has not done so."""
    if read_endings(reports).get("rank-0", ending).code != PEER_LOST and (reports / "rank-0.json").exists():
        return
    with suppress(OSError):
        log = LineFile(Path((reports / "rank-0.log").read_text(encoding="utf-8")))
        for line in ending.lines():
            log.write(log_line(line))
        log.close()


def log_line(message: str) -> str:
    """A message in the format of the log."""
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {printable_text(message)}"


def alive(reports: Path) -> list[psutil.Process]:
    """The processes of a run that have started and not ended."""
    found = []
    for path in reports.glob("rank-*.pid"):
        with suppress(ValueError, psutil.Error):
            process = psutil.Process(int(path.read_text(encoding="utf-8")))
            if process.environ().get(REPORTS) == str(reports) and _is_alive(process):
                found.append(process)
    return found


def join_endings(codes: Mapping[int, int], reports: Path, world_size: int) -> Ending:
    """Reduce the endings of all processes to one.

    `codes`: the exit codes of the processes that failed first, by rank; negative: the signal that killed one.
    """
    endings = {name: ending for name, ending in read_endings(reports).items() if name != LAUNCHER}
    reported = [ending for ending in endings.values() if ending.code != PEER_LOST]
    problems = tuple(dict.fromkeys(problem for ending in reported for problem in ending.problems))
    for rank, code in codes.items():
        by_launcher = code == -signal.SIGTERM and problems  # it ends those that still run after one has failed
        if code < 0 and f"rank-{rank}" not in endings and not by_launcher:
            return killed(_name(rank, world_size), -code)
    if problems:
        wrong_use = any(ending.code == EXIT_WRONG_USE for ending in reported)
        return Ending(EXIT_WRONG_USE if wrong_use else EXIT_FAILED, problems)
    if reported:
        return reported[0]
    # These failed because of a process on another machine, or one that the system ended without a signal.
    rank, code = next(((rank, code) for rank, code in codes.items() if code != PEER_LOST), (0, PEER_LOST))
    what = (
        "a process on another machine has died" if code == PEER_LOST else f"{_name(rank, world_size)} ended with {code}"
    )
    return Ending(EXIT_FAILED, (Problem(f"{what}; continue with `--resume auto`"),))


def killed(who: str, number: int) -> Ending:
    """The ending of a run one of whose processes was killed."""
    return Ending(EXIT_FAILED, (Problem(f"{who} was killed (signal {number}); continue with `--resume auto`"),))


def _name(rank: int, world_size: int) -> str:
    return f"process {rank + 1} of {world_size}"

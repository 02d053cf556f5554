"""Runs in separate processes, killed at some moment, and what remains of them."""

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import psutil

from diffsynth_cli.main import main

MARK = "DIFFSYNTH_TEST_RUN"
"""Environment variable that identifies the processes of one run."""
GONE_SECONDS = 10
"""Timeout after which no process of a killed run may be left."""


class Process(Protocol):
    """The part of `subprocess.Popen` that is used."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...

    def kill(self) -> None: ...


class TrainingRun:
    """`diffsynth train` in a separate process, which is the leader of a session."""

    command = "train"

    def __init__(self, words: list[str], models: Path, folder: Path, **streams: object) -> None:
        self.mark = f"{os.getpid()}-{random.SystemRandom().getrandbits(64)}"
        self.log = folder / f"stderr-{self.mark}"
        environment = os.environ | {"DIFFSYNTH_MODEL_BASE_PATH": str(models), "OMP_NUM_THREADS": "1", MARK: self.mark}
        with self.log.open("w") as log:
            self.process = self._start(words, environment, folder, **{"stderr": log, **streams})

    def _start(self, words: list[str], environment: dict[str, str], folder: Path, **streams: object) -> Process:
        return subprocess.Popen(
            [sys.executable, "-m", "diffsynth_cli", self.command, *words],
            cwd=folder,
            env=environment,
            start_new_session=True,
            **{"stdout": subprocess.DEVNULL, **streams},
        )

    def stderr(self) -> str:
        """Its stderr, unless redirected."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_until(self, what: Callable[[], bool], seconds: float = 300) -> bool:
        """Wait for a condition; return False if the run ends first."""
        until = time.monotonic() + seconds
        while not what():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < until, self.stderr()
            time.sleep(0.01)
        return True

    def left(self) -> list[psutil.Process]:
        """Return all processes of the run that are alive."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = os.getsid(process.pid) == self.process.pid or process.environ().get(MARK) == self.mark
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def wait_until_gone(self, seconds: float) -> float:
        """Return the seconds until no process is left; after a timeout, end them and fail."""
        started = time.monotonic()
        while left := self.left():
            if time.monotonic() - started > seconds:
                remaining = [(process.pid, process.cmdline()) for process in left]
                self.end()
                raise AssertionError(f"left after {seconds} s: {remaining}\n{self.stderr()}")
            time.sleep(0.05)
        return time.monotonic() - started

    def end(self) -> None:
        """End all remaining processes."""
        for process in self.left():
            process.kill()
        self.process.wait()

    def __enter__(self) -> "TrainingRun":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


class ForkedRun(TrainingRun):
    """The same, forked from this process after it has imported what takes longer than a small run."""

    def _start(self, words: list[str], environment: dict[str, str], folder: Path, **streams: object) -> Process:
        process = os.fork()
        if process:
            return _Forked(process)
        try:
            if streams.get("terminal"):
                os.login_tty(os.dup(streams["stderr"].fileno()))
            else:
                os.setsid()
            if "ours" in streams:
                os.close(streams["ours"])  # the other end of the stream, which is to break with this process alone
            os.chdir(folder)
            os.environ.update(environment)
            sys.stdin.close()
            for number, stream in ((1, streams["stderr"]), (2, streams["stderr"])):
                os.dup2(stream.fileno(), number)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
            code = main([self.command, *words])
        except BaseException:
            traceback.print_exc()
            code = 99
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


class _Forked:
    """A child of this process."""

    def __init__(self, number: int) -> None:
        self.pid, self._code = number, None

    def poll(self) -> int | None:
        if self._code is None:
            number, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if number else None
        return self._code

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        return self._code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def steps_done(output: Path) -> int:
    """Return the number of lines in the metrics of a run."""
    metrics = output / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0

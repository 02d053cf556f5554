"""Examination of files in worker processes: one bad file never ends the run. No torch.

Each worker has one current file and one queued file. A file that takes too long, or crashes its worker, becomes facts
with a fault, and another worker continues.
"""

import multiprocessing
import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import psutil

from diffsynth_core.data.formats import ending_of, kind_of_ending
from diffsynth_core.dataset_report.facts import Fault, ImageFacts, VideoFacts
from diffsynth_core.dataset_report.images import examine_image
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.processes import end_with_parent
from diffsynth_core.progress import Reporter

START_SECONDS = 120.0
"""Timeout for the start of a worker."""
Kind = Literal["image", "video"]
"""Type of a file."""
Facts = ImageFacts | VideoFacts
"""Facts about a file."""


@dataclass(frozen=True)
class Job:
    """How files are examined; sent to each worker at its start.

    Attributes:
        frame_rate: training frame rate; None: the file's own.
        thumbnails: longer side in pixels.
    """

    base: Path
    frame_rate: float | None = None
    thumbnails: int | None = None


EXAMINERS: Mapping[Kind, Callable[[Job, str], Facts]] = {
    "image": lambda job, name: examine_image(job.base, name, job.thumbnails),
    "video": lambda job, name: _examine_target(job, name),
}
"""Type of a file -> function that examines it."""
UNREADABLE: Mapping[Kind, Callable[[str, str], Facts]] = {
    "image": lambda name, reason: ImageFacts(name, 0, fault=Fault("IMAGE_UNREADABLE", reason)),
    "video": lambda name, reason: (
        ImageFacts(name, 0, fault=Fault("IMAGE_UNREADABLE", reason))
        if kind_of_ending(ending_of(name)) == "image"
        else VideoFacts(name, 0, fault=Fault("VIDEO_UNREADABLE", reason))
    ),
}
"""Type of a file -> facts about one whose worker did not return."""


def _examine_target(job: Job, name: str) -> Facts:
    """Return the facts of a target in a dataset of clips: a clip, or an image that counts as one frame."""
    # Imported for videos only: without numpy and the decoder of videos, a worker starts in half the time.
    from diffsynth_core.data.media import is_clip
    from diffsynth_core.dataset_report.videos import examine_video

    try:
        if is_clip(job.base / name):
            return examine_video(job.base, name, job.frame_rate, job.thumbnails)
    except (DiffSynthError, OSError):
        return VideoFacts(name, 0, fault=Fault("VIDEO_UNREADABLE", "neither a video nor an image"))
    return examine_image(job.base, name, job.thumbnails)


def work(job: Job, line: Connection, parent: int) -> None:
    """Main loop of a worker: report readiness, then receive files and send facts, until `parent` ends."""
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one, which ends it
    warnings.simplefilter("ignore")  # what decoders think of a file is not for the terminal
    line.send(None)
    while True:
        try:
            name, kind = line.recv()
        except (EOFError, OSError):  # the process that started this one is gone
            return
        line.send(EXAMINERS[kind](job, name))


WORK: Callable[[Job, Connection, int], None] = work
"""Code that a worker runs."""


def inspect_files(
    job: Job, files: Mapping[str, Kind], workers: int, timeout: float, reporter: Reporter
) -> dict[str, Facts]:
    """Return the facts of `files` (path -> kind), in their order.

    Args:
        workers: processes; 0: as many as usable cores.
        timeout: seconds per file.
    """
    found: dict[str, Facts] = {}
    count = min(workers or usable_cores(), len(files))
    with reporter.task("Decoding", len(files), "files") as task:
        for name, facts in _in_workers(job, files, count, timeout):
            found[name] = facts
            task.advance()
    return {name: found[name] for name in files}


def usable_cores() -> int:
    """Return the number of cores that this process may use, or of all cores where that is unknown, as on macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Worker:
    """A process, its current file, and its deadline (`time.monotonic`); without a file it is starting.

    Attributes:
        following: queued file, so that the worker need not wait for this process between two files.
    """

    process: BaseProcess
    line: Connection
    until: float
    name: str = ""
    following: str = ""


def _in_workers(job: Job, files: Mapping[str, Kind], count: int, timeout: float) -> Iterator[tuple[str, Facts]]:
    """Yield facts in the order in which they arrive."""
    context = multiprocessing.get_context("spawn")  # a bar's thread runs here, and forking with threads is unsafe
    waiting = deque(files)
    workers = {worker.line: worker for worker in (_start(context, job) for _ in range(count))}
    left = len(files)
    try:
        while left:
            for worker, facts, reason in _answers(workers, timeout):
                if worker.name:
                    yield worker.name, facts or UNREADABLE[files[worker.name]](worker.name, reason)
                    left -= 1
                elif reason:
                    what = f"cannot start a process to decode files: {reason}"
                    raise DiffSynthError(what, "free some memory, or skip decoding with `--depth paths`")
                if reason:
                    _end(workers.pop(worker.line))
                    waiting.extendleft(name for name in (worker.following,) if name)
                    if waiting:
                        started = _start(context, job)
                        workers[started.line] = started
                    continue
                _give(worker, waiting, files, timeout, ahead=len(waiting) > len(workers))
                if not worker.name:
                    _end(workers.pop(worker.line))
    finally:
        for worker in workers.values():
            _end(worker)


def _answers(workers: Mapping[Connection, _Worker], timeout: float) -> list[tuple[_Worker, Facts | None, str]]:
    """Yield workers with a result or past their deadline: the facts, or the reason why there are none."""
    soonest = min(worker.until for worker in workers.values())
    arrived = wait(list(workers), max(0.0, soonest - time.monotonic()))
    answers: list[tuple[_Worker, Facts | None, str]] = []
    for line, worker in workers.items():
        if line in arrived:
            try:
                answers.append((worker, line.recv(), ""))
            except (EOFError, OSError):
                answers.append((worker, None, "the decoder crashed" if worker.name else "it exited immediately"))
        elif worker.until <= time.monotonic():
            limit = f"{timeout:g} s (`--file_timeout`)" if worker.name else f"{START_SECONDS:g} s"
            answers.append((worker, None, f"timed out after {limit}"))
    return answers


def _start(context: SpawnContext, job: Job) -> _Worker:
    ours, theirs = context.Pipe()
    process = context.Process(target=WORK, args=(job, theirs, os.getpid()), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, time.monotonic() + START_SECONDS)


def _give(worker: _Worker, waiting: deque[str], files: Mapping[str, Kind], timeout: float, ahead: bool) -> None:
    """Let a worker continue with its queued file, and send it what it lacks: a file, and with `ahead` another."""
    worker.name, worker.following = worker.following, ""
    worker.until = time.monotonic() + timeout
    if waiting and not worker.name:
        worker.name = _send(worker, waiting, files)
    if waiting and ahead:
        worker.following = _send(worker, waiting, files)


def _send(worker: _Worker, waiting: deque[str], files: Mapping[str, Kind]) -> str:
    name = waiting.popleft()
    worker.line.send((name, files[name]))
    return name


def _end(worker: _Worker) -> None:
    """End a worker and the decoder that it waits for, which would continue alone."""
    decoders = []
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(worker.process.pid)
        process.suspend()  # it must not start another one now
        decoders = process.children(recursive=True)
    worker.process.kill()
    for decoder in decoders:
        with suppress(psutil.NoSuchProcess):
            decoder.kill()
    worker.process.join()
    worker.line.close()

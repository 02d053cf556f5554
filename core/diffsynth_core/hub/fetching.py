"""Transfer of files: several in parallel, each resumed, verified against the hub's checksum, and renamed at the end."""

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import BinaryIO

from diffsynth_core.errors import DiffSynthError, Problem, raise_if_any
from diffsynth_core.files import move_into_place
from diffsynth_core.hub.client import Hub, TransientHubError
from diffsynth_core.hub.download_plan import PART_NAME, DownloadPlan, ListedFile, resumable_bytes
from diffsynth_core.hub.identity import HashCache
from diffsynth_core.progress import BYTES, Reporter, SilentReporter, Task, pluralize

THREADS = 4
"""Parallel transfers: one connection rarely uses the full bandwidth."""
BACK_OFF_SECONDS = (1, 2, 4, 8, 15)
"""Delays before retries after attempts without progress; an attempt that receives bytes resets them."""
WRONG_HASHES = 2
"""Attempts per file that may end in a checksum mismatch."""
SHOWN_BYTES = 1_000_000
"""Minimum size for a progress bar of its own: smaller files end too soon, and a dataset has thousands."""
LABEL_WIDTH = 32
"""Maximum width of the label of a progress bar."""
BLOCK_BYTES = 4 * 1024 * 1024
"""Block size for hashing bytes that are already on disk."""


def fetch(plan: DownloadPlan, hub: Hub, identities: HashCache, reporter: Reporter) -> None:
    """Download what is missing; an interruption at any moment leaves partial files that the next download resumes.

    The hashes of complete files are cached, so that a run need not hash them again.

    Raises:
        FaultsFound: all files whose download failed; the others are complete.
        DiffSynthError: if the disk refuses.
    """
    _remove_old_parts(plan.to_fetch)
    queue: SimpleQueue[ListedFile] = SimpleQueue()
    for listed in plan.to_fetch:
        queue.put(listed)
    total = sum(listed.file.size for listed in plan.to_fetch)
    label = f"{pluralize(len(plan.to_fetch), 'file')} in total"
    with reporter.task(label, total, BYTES, done=total - plan.missing_bytes) as whole:
        pool = _DownloadPool(queue, hub, identities, reporter, whole)
        pool.work()
    raise_if_any(pool.problems)


class _DownloadPool:
    """Threads that download the files of a queue.

    The threads are daemons and not joined when the process is stopped: at every moment the bytes on disk are a valid
    prefix of the file.
    """

    def __init__(
        self, queue: SimpleQueue[ListedFile], hub: Hub, identities: HashCache, reporter: Reporter, whole: Task
    ) -> None:
        self._queue, self._hub, self._identities, self._reporter, self._whole = queue, hub, identities, reporter, whole
        self._stopped = threading.Event()
        self._advancing = threading.Lock()
        self._failure: BaseException | None = None
        self.problems: list[Problem] = []

    def work(self) -> None:
        """Download all files; a bug or a disk error stops all threads at once."""
        threads = [threading.Thread(target=self._run, daemon=True) for _ in range(min(THREADS, self._queue.qsize()))]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(timeout=0.2)  # a join without a timeout blocks Ctrl-C on some systems
        finally:
            self._stopped.set()
        if self._failure:
            raise self._failure

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                listed = self._queue.get_nowait()
            except Empty:
                return
            try:
                self._fetch(listed)
            except _Stopped:
                return
            except _DownloadFailed as error:
                self.problems += error.problems
            except OSError as error:
                self._stop(_unwritable(listed.target, error))
            except BaseException as error:
                self._stop(error)

    def _stop(self, failure: BaseException) -> None:
        """Stop all threads; the first failure is the one that is raised."""
        self._failure = self._failure or failure
        self._stopped.set()

    def _fetch(self, listed: ListedFile) -> None:
        listed.target.parent.mkdir(parents=True, exist_ok=True)
        _adopt_truncated_file(listed)
        reporter = self._reporter if listed.file.size >= SHOWN_BYTES else SilentReporter()
        with reporter.task(_label(listed), listed.file.size, BYTES, done=listed.bytes_here) as task:
            with _Part(listed) as part:
                for _ in range(WRONG_HASHES):
                    self._fill(listed, part, task)
                    if part.is_valid():
                        break
                    self._advance(task, -part.size)
                    part.restart()
                    self._reporter.warn(
                        f"`{listed.target}`: checksum mismatch with {self._hub.title}; the download is discarded"
                    )
                else:
                    raise _DownloadFailed(
                        f"checksum mismatch for `{listed.file.path}` of `{listed.repository.name}` from {self._hub.title}",
                        f"try again later, or {self._hub.another}",
                    )
            move_into_place(listed.part, listed.target)
        if listed.file.checksum and listed.file.checksum.kind == "sha256":
            self._identities.store(listed.target, listed.file.checksum.hexdigest)

    def _fill(self, listed: ListedFile, part: "_Part", task: Task) -> None:
        """Append to the partial file until it is complete; transient errors are retried."""
        failures = 0
        while part.size < listed.file.size:
            before = part.size
            try:
                self._transfer(listed, part, task)
            except TransientHubError as error:
                failures, attempts = 1 if part.size > before else failures + 1, len(BACK_OFF_SECONDS)
                if failures > attempts:
                    raise _DownloadFailed(
                        f"cannot download `{listed.file.path}` of `{listed.repository.name}` from {self._hub.title}: {error}",
                        "run the command again to resume the download",
                    ) from error
                delay = BACK_OFF_SECONDS[failures - 1]
                self._reporter.warn(f"`{listed.file.path}`: {error}; retrying in {delay} s ({failures} of {attempts})")
                self._pause(delay)
            except DiffSynthError as error:
                raise _DownloadFailed(error.problems[0].message, error.problems[0].hint) from error

    def _transfer(self, listed: ListedFile, part: "_Part", task: Task) -> None:
        """Append one response of the hub to the partial file."""
        with self._hub.read(listed.repository, listed.file, part.size) as (start, chunks):
            if start != part.size:
                if start:
                    raise TransientHubError("the hub sent a different part of the file than requested")
                self._advance(task, -part.size)
                part.restart()
            for chunk in chunks:
                self._pause(0)
                if part.size + len(chunk) > listed.file.size:
                    raise TransientHubError("the hub sent more bytes than its file list declares")
                part.append(chunk)
                self._advance(task, len(chunk))
        if part.size < listed.file.size:
            raise TransientHubError("the hub ended the transfer early")

    def _advance(self, task: Task, amount: int) -> None:
        task.advance(amount)
        with self._advancing:
            self._whole.advance(amount)

    def _pause(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise _Stopped


class _DownloadFailed(DiffSynthError):
    """The download of one file failed; the others continue."""


class _Stopped(BaseException):
    """Another thread failed, or the process was stopped."""


class _Part:
    """The partial file on disk, with its hash so far."""

    def __init__(self, listed: ListedFile) -> None:
        self._path, self._file = listed.part, listed.file
        self._stream: BinaryIO = open(self._path, "a+b", buffering=0)  # noqa: SIM115, PTH123 - closed by __exit__
        self.size = 0
        self._begin()
        for block in _blocks(self._path):
            self._count(block)

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, *ended: object) -> None:
        self._stream.close()
        if self.size == 0 < self._file.size:
            self._path.unlink()

    def append(self, chunk: bytes) -> None:
        self._stream.write(chunk)
        self._count(chunk)

    def restart(self) -> None:
        self._stream.truncate(0)
        self._begin()

    def is_valid(self) -> bool:
        """Return whether the bytes match the hub's checksum; without one, the size decides."""
        checksum = self._file.checksum
        return not (checksum and self._hash) or self._hash.hexdigest() == checksum.hexdigest

    def _begin(self) -> None:
        self.size = 0
        self._hash = self._file.checksum.start(self._file.size) if self._file.checksum else None

    def _count(self, block: bytes) -> None:
        self.size += len(block)
        if self._hash:
            self._hash.update(block)


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            yield block


def _remove_old_parts(files: Iterable[ListedFile]) -> None:
    """Remove partial files of older versions on the hub.

    Each folder is listed once, since it may contain a whole dataset.
    """
    by_target = {listed.target: listed for listed in files}
    for folder in {target.parent for target in by_target}:
        for part in folder.glob(".*.part"):
            match = PART_NAME.fullmatch(part.name)
            listed = by_target.get(folder / match["name"]) if match else None
            if listed and part.is_file() and (part != listed.part or part.stat().st_size > listed.file.size):
                try:
                    part.unlink()
                except OSError as error:
                    raise _unwritable(part, error) from error


def _unwritable(path: Path, error: OSError) -> DiffSynthError:
    return DiffSynthError(
        f"cannot write `{path}`: {error.strerror or error}", "free some space or choose another folder"
    )


def _adopt_truncated_file(listed: ListedFile) -> None:
    """Turn a truncated file under the final name into the partial file, if it is the longer prefix."""
    size = resumable_bytes(listed.target)
    if 0 < size < listed.file.size and size >= listed.bytes_here:
        listed.target.replace(listed.part)


def _label(listed: ListedFile) -> str:
    """Return the end of a file's path, by which shards differ."""
    path = listed.file.path
    return path if len(path) <= LABEL_WIDTH else f"…{path[1 - LABEL_WIDTH :]}"

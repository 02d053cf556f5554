"""Lock files between processes, released by the system however a process ends. No torch."""

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from diffsynth_core.errors import DiffSynthError

_held: set[int] = set()
"""Descriptors of the lock files that this process holds."""


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock file `path` within the block; no effect if it cannot be created, as on a read-only disk.

    Args:
        waiting: called once if another process holds the lock.

    Raises:
        DiffSynthError: if `path` is a link, a folder or another special file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_lock(path)
    except OSError:
        yield
        return
    with holding(descriptor, waiting):
        yield


def open_lock(path: Path) -> int:
    """Open a lock file, creating it if it is missing, and return its descriptor.

    Links are not followed and nothing is truncated: in a shared folder, somebody could have placed a link to one of
    the user's files at this name.

    Raises:
        DiffSynthError: if `path` is not a regular file.
        OSError: if it can be neither opened nor created.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        status = None
    if status and not stat.S_ISREG(status.st_mode):
        kind = (
            "a link"
            if stat.S_ISLNK(status.st_mode)
            else "a folder"
            if stat.S_ISDIR(status.st_mode)
            else "not a regular file"
        )
        raise DiffSynthError(f"the lock file `{path}` is {kind}", "remove it, or choose another folder")
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


@contextmanager
def holding(descriptor: int, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of an open lock file within the block, and close the file at its end.

    `flock` belongs to the open file description, which forked processes share: a data worker that outlives a killed
    run would still hold its lock. Record locks (`lockf`) are not inherited, but a process loses them as soon as
    anything in it closes the same file, and they do not exclude threads of one process. So forked children close the
    descriptor first.

    Args:
        waiting: called once if another process holds the lock; may raise to give up.
    """
    _close_in_forked_children()
    _held.add(descriptor)
    try:
        _acquire(descriptor, waiting)
        yield
    finally:
        if descriptor in _held:  # else this is a forked child that unwinds
            _held.remove(descriptor)
            os.close(descriptor)


def _acquire(descriptor: int, waiting: Callable[[], None]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        waiting()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks, as on some clusters


@cache
def _close_in_forked_children() -> None:
    """Register closing the held descriptors in forked children; cached, so that it happens once."""
    os.register_at_fork(after_in_child=_close_held)


def _close_held() -> None:
    while _held:
        os.close(_held.pop())

"""Lock files: one process at a time; the system lets go of them however that process ends. No torch."""

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
    """Within it no other process holds the lock file `path`; without effect where it cannot be made.

    `waiting` is called once when another process holds it.

    Raises:
        DiffSynthError: when `path` is a link, a folder or the like.
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
    """Open a lock file, made if it is missing. A link is not followed and nothing is truncated: the name may have been
    put there to have us empty another file.

    Raises:
        DiffSynthError: when `path` is no plain file.
        OSError: when it cannot be opened or made.
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
    """Within it this process, and none that it forks, holds the lock of an open lock file, which is closed at the end.

    `waiting` is called once when another process holds it, and gives up by raising.

    `flock` belongs to the open file, which forked processes share: a data worker that outlives a killed run would hold
    its lock. Record locks (`lockf`) are not inherited, but a process loses them as soon as anything in it closes the
    same file, and does not keep itself out. So forked children close the descriptor before anything else.
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
        pass  # a file system without locks, as some of clusters are


@cache
def _close_in_forked_children() -> None:
    """Have forked children close what is held; said to the system once."""
    os.register_at_fork(after_in_child=_close_held)


def _close_held() -> None:
    while _held:
        os.close(_held.pop())

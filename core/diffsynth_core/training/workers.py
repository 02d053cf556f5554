"""Loading data in worker processes."""

import os
import pickle
import signal
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import Lock, context, get_start_method
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from diffsynth_core.errors import STOPPING_SIGNALS, DiffSynthError, FaultsFound, Problem
from diffsynth_core.processes import end_with_parent
from diffsynth_core.progress import pluralize

Item = TypeVar("Item")
LOCKS_OF_A_WORKER = 4
"""Upper bound of the locks in the queue of a worker; the shared result queue needs as many."""


@dataclass(frozen=True)
class _Failed:
    """An item that could not be loaded: torch would turn an exception into text with a traceback."""

    problems: tuple[Problem, ...]


class _Packed(Dataset[bytes | _Failed], Generic[Item]):
    """A dataset that returns pickled items, and its errors as values.

    torch would pass tensors through /dev/shm, which is 64 MB in Docker by default, and a worker that finds it full
    hangs.
    """

    def __init__(self, dataset: Dataset[Item]) -> None:
        self._dataset = dataset

    def __getitem__(self, index: Any) -> bytes | _Failed:
        try:
            return pickle.dumps(self._dataset[index], pickle.HIGHEST_PROTOCOL)
        except DiffSynthError as error:
            return _Failed(error.problems)


def iterate(dataset: Dataset[Item], indices: Iterable[Any], workers: int) -> Iterator[Item]:
    """Yield the items of a dataset at `indices`, in order, loaded by `workers` processes (0: in this process).

    `indices` may be infinite: it is consumed only as far ahead as the workers prefetch.

    Raises:
        DiffSynthError: if an item cannot be loaded, or the system provides no more processes or no space for their
            queues.
    """
    if not workers:
        yield from map(dataset.__getitem__, indices)
        return
    _check_shared_memory(workers)
    with warnings.catch_warnings():
        # The number of workers is the user's choice; torch warns if there are more than cores.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader = DataLoader(
            _Packed(dataset),
            batch_size=None,
            sampler=indices,
            num_workers=workers,
            multiprocessing_context=_WorkerContext() if get_start_method() == "fork" else None,
            worker_init_fn=partial(_init_worker, parent=os.getpid()),
        )
        items = iter(loader)
    for item in items:
        if isinstance(item, _Failed):
            raise FaultsFound(item.problems)
        yield pickle.loads(item)


def _check_shared_memory(workers: int) -> None:
    """Check that the locks of the queues fit into /dev/shm.

    Checked in advance, because a failure halfway through starting the workers prints tracebacks of their destructors.

    Raises:
        DiffSynthError: if they do not.
    """
    try:
        locks = [Lock() for _ in range(LOCKS_OF_A_WORKER * (workers + 1))]
    except OSError as error:
        raise DiffSynthError(
            f"cannot start {pluralize(workers, 'data worker')}: {error.strerror or error}; each needs some space in `/dev/shm`",
            "free some, or give the container more (`docker run --shm-size`); `--dataset_num_workers 0` needs none",
        ) from error
    locks.clear()


class _WorkerProcess(context.ForkProcess):
    """A worker. torch ends slow ones with SIGTERM, which workers ignore (see `_init_worker`)."""

    def terminate(self) -> None:
        self.kill()


class _WorkerContext(context.ForkContext):
    """Starts such workers."""

    Process = _WorkerProcess


def _init_worker(worker: int, parent: int) -> None:
    """Ignore stop signals, and end with the training process.

    Ctrl-C reaches all processes of the group: the training process must save first, and then ends its workers itself.
    """
    for number in STOPPING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)

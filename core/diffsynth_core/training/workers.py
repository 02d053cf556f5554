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

Item = TypeVar("Item")
LOCKS_OF_A_WORKER = 4
"""At most, in the queue of each worker and in the one that all of them fill."""


@dataclass(frozen=True)
class _Failed:
    """An item that could not be loaded; torch would carry an exception over as a text with its traceback."""

    problems: tuple[Problem, ...]


class _Guarded(Dataset[Any], Generic[Item]):
    """A dataset whose faults are values.

    `packed`: items are bytes. As tensors torch would put them into /dev/shm, of which a container has 64 MB if nothing
    else is said, and where there is no room a worker waits for ever.
    """

    def __init__(self, dataset: Dataset[Item], packed: bool) -> None:
        self._dataset, self._packed = dataset, packed

    def __getitem__(self, place: Any) -> Item | bytes | _Failed:
        try:
            item = self._dataset[place]
            return pickle.dumps(item, pickle.HIGHEST_PROTOCOL) if self._packed else item
        except DiffSynthError as error:
            return _Failed(error.problems)


def iterate(dataset: Dataset[Item], places: Iterable[Any], workers: int) -> Iterator[Item]:
    """The items of a dataset at `places`, in order, loaded by `workers` processes (0: in this one).

    `places` may be endless: it is read as far ahead as the workers are.

    Raises:
        FaultsFound: when an item cannot be loaded, as the dataset raised it.
        DiffSynthError: when the system gives no more processes, or no room for what they share.
    """
    if workers:
        _check_shared_memory(workers)
    with warnings.catch_warnings():
        # The number of workers is the user's choice; torch would advise against more than there are cores.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader = DataLoader(
            _Guarded(dataset, packed=workers > 0),
            batch_size=None,
            sampler=places,
            num_workers=workers,
            multiprocessing_context=_WorkerContext() if workers and get_start_method() == "fork" else None,
            worker_init_fn=partial(_init_worker, parent=os.getpid()),
        )
        items = iter(loader)
    for item in items:
        if isinstance(item, _Failed):
            raise FaultsFound(item.problems)
        yield pickle.loads(item) if isinstance(item, bytes) else item


def _check_shared_memory(workers: int) -> None:
    """Queues between processes have locks in /dev/shm, whatever is handed on through them. They are tried out first:
    where torch fails over them halfway, what it has begun says so too when it is let go.

    Raises:
        DiffSynthError: when there is no room for them.
    """
    try:
        locks = [Lock() for _ in range(LOCKS_OF_A_WORKER * (workers + 1))]
    except OSError as error:
        raise DiffSynthError(
            f"cannot start {workers} data workers: {error.strerror or error}; each needs some space in `/dev/shm`",
            "free some, or give the container more (`docker run --shm-size`); `--dataset_num_workers 0` needs none",
        ) from error
    locks.clear()


class _WorkerProcess(context.ForkProcess):
    """A worker. torch asks one that is slow to end with SIGTERM, which workers leave to the training process."""

    def terminate(self) -> None:
        self.kill()


class _WorkerContext(context.ForkContext):
    """Starts such workers."""

    Process = _WorkerProcess


def _init_worker(worker: int, parent: int) -> None:
    """Let a signal to the whole group reach the training process alone, which saves first and then ends its workers;
    where that process is killed, end with it."""
    for number in STOPPING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)

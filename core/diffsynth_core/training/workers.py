"""Loading data in worker processes."""

import signal
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

Item = TypeVar("Item")


def iterate(dataset: Dataset[Item], places: Iterable[Any], workers: int) -> Iterator[Item]:
    """The items of a dataset at `places`, in order, loaded by `workers` processes (0: in this one).

    `places` may be endless: it is read as far ahead as the workers are.
    """
    with warnings.catch_warnings():
        # The number of workers is the user's choice; torch would advise against more than there are cores.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader = DataLoader(
            dataset, batch_size=None, sampler=places, num_workers=workers, worker_init_fn=_leave_signals
        )
        return iter(loader)


def _leave_signals(worker: int) -> None:
    """Let Ctrl-C reach the training process alone, which ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

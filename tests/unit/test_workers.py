"""Items from worker processes: the same as without, through pipes, faults as values."""

from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch.utils.data import Dataset

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.training.workers import iterate


class Squares(Dataset):
    def __getitem__(self, place):
        if place == 5:
            raise DiffSynthError("five is damaged", "leave it out")
        return place, {"square": torch.full((3,), place**2), "text": "x" * place}


@pytest.mark.parametrize("workers", [0, 2])
def test_items_come_in_order_and_whole(workers):
    items = list(iterate(Squares(), [3, 1, 4], workers))
    assert [(place, item["square"].tolist(), item["text"]) for place, item in items] == [
        (place, [place**2] * 3, "x" * place) for place in (3, 1, 4)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_is_raised_as_it_was(workers):
    with pytest.raises(DiffSynthError, match="five is damaged"):
        list(iterate(Squares(), [1, 5], workers))


def test_no_tensor_goes_through_shared_memory(tmp_path, monkeypatch):
    """A container has 64 MB of it: where it is full, torch's workers wait for ever."""
    share = ForkingPickler._extra_reducers[torch.Tensor]

    def spy(tensor):
        (tmp_path / "shared").touch()
        return share(tensor)

    monkeypatch.setitem(ForkingPickler._extra_reducers, torch.Tensor, spy)
    assert len(list(iterate(Squares(), [1, 2], 1))) == 2
    assert not (tmp_path / "shared").exists()

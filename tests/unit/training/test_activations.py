"""What waits in host memory for the backward pass: activations, and no weights; and when it is copied."""

from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from diffsynth_core.adapters.streams import CopyStream
from diffsynth_core.training.activations import LEAVING, HostActivation, OffloadActivations, is_weight


def saved_by(module: nn.Module, value: torch.Tensor, recompute: bool = False) -> list[torch.Tensor]:
    """The tensors that the backward pass of a module keeps."""
    saved: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        (checkpoint(module, value, use_reentrant=False) if recompute else module(value)).sum().backward()
    return saved


def test_the_weight_of_a_linear_layer_is_told_from_its_input():
    layer, value = nn.Linear(3, 5), torch.randn(2, 3, requires_grad=True)
    saved = saved_by(layer, value)
    assert {tuple(tensor.shape) for tensor in saved if is_weight(tensor)} <= {(5, 3), (3, 5)}
    assert [tuple(tensor.shape) for tensor in saved if not is_weight(tensor)] == [(2, 3)]
    assert any(is_weight(tensor) for tensor in saved)


def test_of_a_recomputed_block_only_its_input_waits():
    block, value = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3)), torch.randn(2, 3, requires_grad=True)
    waiting = [tensor for tensor in saved_by(block, value, recompute=True) if not is_weight(tensor)]
    assert [tuple(tensor.shape) for tensor in waiting] == [(2, 3)]
    assert torch.equal(waiting[0], value)


def test_gradients_are_those_of_a_plain_run():
    block, value = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3)), torch.randn(2, 3)
    block(value).sum().backward()
    plain = [parameter.grad.clone() for parameter in block.parameters()]
    block.zero_grad()
    with OffloadActivations():
        loss = checkpoint(block, value, use_reentrant=False).sum()
    loss.backward()
    assert all(torch.equal(parameter.grad, one) for parameter, one in zip(block.parameters(), plain, strict=True))


class RecordedCopies(CopyStream):
    """Copies at once, and records the order: tensors are named by their value, which is the same in all of one."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.computations = 0

    def computed(self) -> int:
        self.computations += 1
        return self.computations

    def copy(self, target: Tensor, source: Tensor, after: int) -> str:
        assert after == self.computations, "a copy follows what was computed before it was asked for"
        target.copy_(source)
        away = f"away {int(source[0])}"
        self.log.append(away if away not in self.log else f"back {int(source[0])}")
        return self.log[-1]

    def wait(self, copied: str) -> None:
        self.log.append(f"wait for {copied}")


def save(copies: CopyStream, count: int) -> list[HostActivation]:
    saved: list[HostActivation] = []
    for number in range(1, count + 1):
        before = ref(saved[-1]) if saved else None
        saved.append(HostActivation(torch.full((3,), number), torch.empty(3, dtype=torch.int64), copies, before))
    return saved


def test_copies_back_are_one_ahead_of_what_is_asked_for():
    copies = RecordedCopies()
    first, second, third = save(copies, 3)
    assert copies.log == ["away 1", "away 2", "away 3"]
    assert [int(one.restore()[0]) for one in (third, second, first)] == [3, 2, 1]
    assert copies.log[3:] == ["back 3", "wait for back 3", "back 2", "wait for back 2", "back 1", "wait for back 1"]


def test_all_inputs_of_the_next_block_are_on_their_way_when_those_of_a_block_are_there():
    """Inputs of a block are asked for in the order in which they were saved."""
    copies = RecordedCopies()
    first, second, third, fourth = save(copies, 4)
    for one in (third, fourth):
        one.restore()
    assert copies.log[4:] == ["back 3", "wait for back 3", "back 2", "back 4", "wait for back 4", "back 1"]
    for one in (first, second):
        one.restore()
    assert copies.log[10:] == ["wait for back 1", "wait for back 2"]


def test_what_is_asked_for_again_is_copied_again():
    copies = RecordedCopies()
    saved = save(copies, 2)
    assert all(torch.equal(saved[1].restore(), torch.full((3,), 2)) for _ in range(2))
    assert copies.log[2:].count("back 2") == 2 and copies.log.count("back 1") == 1


def test_what_the_graph_has_dropped_is_not_copied_back():
    copies = RecordedCopies()
    saved = save(copies, 3)
    del saved[1]
    saved[1].restore()
    assert copies.log[3:] == ["back 3", "wait for back 3"]


def test_what_nobody_asks_for_is_not_freed_while_it_is_copied():
    copies = RecordedCopies()
    saved = save(copies, 2)
    saved[1].restore()
    saved.clear()
    assert copies.log[2:] == ["back 2", "wait for back 2", "back 1", "wait for back 1"]


def test_tensors_are_freed_once_they_are_copied():
    """The computation waits for copies from the device, in their order, before it uses the memory again."""
    copies, offload = RecordedCopies(), OffloadActivations()
    with offload:
        for number in range(LEAVING + 2):
            offload._leaving.append((torch.zeros(1), copies, f"away {number}"))
            offload._wait_for_all_but(LEAVING)
        assert copies.log == ["wait for away 0", "wait for away 1"] and len(offload._leaving) == LEAVING
    assert copies.log == [f"wait for away {number}" for number in range(LEAVING + 2)]

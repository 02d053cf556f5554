"""Blocks that train from host memory: never more than two are on the device, and nothing uses what they gave back."""

import pytest
import torch
from torch import Tensor, nn

from diffsynth_core.training.trained_swap import TrainedSwap, WaitingBlock

CPU = torch.device("cpu")
COUNT = 5


class Block(nn.Module):
    """A residual block, modulated as those of transformers are, of which one weight is frozen and one unused."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.inner, self.unused = nn.Linear(4, 8), nn.Linear(4, 4), nn.Parameter(torch.ones(2))
        self.inner.bias.requires_grad_(False)

    def forward(self, states: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition).chunk(2, -1)
        return states + torch.tanh(self.inner(states * scale + shift))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Linear(4, 4), nn.ModuleList(Block() for _ in range(COUNT))
        self.swap = TrainedSwap((), CPU)

    def forward(self, states: Tensor) -> Tensor:
        condition = self.embed(states.mean(0, keepdim=True))
        for block in self.blocks:
            states = self.swap.checkpoint(block, states, condition)
        return states.square().mean()


def train(model: Model) -> list[float]:
    """Descend in the backward pass; return the losses of three steps."""

    def update(weight: Tensor) -> None:
        weight.data.sub_(0.1 * weight.grad)
        weight.grad = None
        model.swap.put_back(weight)

    for weight in model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(update)
    losses = []
    for step in range(3):
        loss = model(torch.randn(6, 4, generator=torch.Generator().manual_seed(step)))
        loss.backward()
        model.swap.release()
        losses.append(loss.item())
    return losses


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks have copies on the device whenever one is fetched; a copy that is given back becomes NaN."""
    seen: list[int] = []
    there: set[WaitingBlock] = set()
    prefetch, release, put_back = WaitingBlock.prefetch, WaitingBlock.release, WaitingBlock.put_back

    def counting(self: WaitingBlock) -> None:
        prefetch(self)
        there.add(self)
        seen.append(sum(bool(block._on_device) for block in there))

    def releasing(self: WaitingBlock) -> None:
        for copy in self._on_device.values():
            copy.fill_(torch.nan)
        release(self)

    def returning(self: WaitingBlock, weight: nn.Parameter) -> None:
        copy = weight.data
        put_back(self, weight)
        copy.fill_(torch.nan)

    monkeypatch.setattr(WaitingBlock, "prefetch", counting)
    monkeypatch.setattr(WaitingBlock, "release", releasing)
    monkeypatch.setattr(WaitingBlock, "put_back", returning)
    return seen


@pytest.mark.parametrize("chosen", [(0,), (COUNT - 1,), (1, 3), tuple(range(COUNT))], ids=str)
def test_it_trains_as_without(most, chosen):
    plain, swapped = Model(), Model()
    swapped.swap = TrainedSwap([swapped.blocks[index] for index in chosen], CPU)
    assert train(plain) == train(swapped)
    assert max(most) == min(2, len(chosen))
    for (name, one), other in zip(plain.named_parameters(), swapped.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_module_is_moved_without_what_waits():
    model = Model()
    values = {name: weight.clone() for name, weight in model.named_parameters()}
    model.swap = TrainedSwap([model.blocks[1]], CPU)
    with model.swap.left_out():
        model.double()
    moved = {name for name, weight in model.named_parameters() if weight.dtype == torch.float64}
    waiting = {f"blocks.1.{name}" for name in ("modulation.weight", "modulation.bias", "inner.weight", "unused")}
    assert moved == values.keys() - waiting
    assert all(torch.equal(model.get_parameter(name), values[name]) for name in waiting)


def test_passes_without_gradients_copy_blocks_too(most):
    """Nothing is checkpointed then."""
    plain, swapped = Model(), Model()
    swapped.swap = TrainedSwap(list(swapped.blocks), CPU)
    states, condition = torch.randn(6, 4), torch.randn(1, 4)
    host = [weight.data_ptr() for weight in swapped.blocks.parameters()]
    with torch.no_grad():
        for one, other in zip(plain.blocks, swapped.blocks, strict=True):
            assert torch.equal(one(states, condition), other(states, condition))
    assert max(most) == 2, "each block is copied, and the next one ahead"
    swapped.swap.release()
    assert [weight.data_ptr() for weight in swapped.blocks.parameters()] == host

"""Compiled blocks: once for each shape and kind, never without compiling; names stay."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounterWithBackend

from diffsynth_core.models import compilation
from diffsynth_core.models.compilation import compile_blocks
from diffsynth_core.models.spec import ComponentFacts

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # PyTorch hides it, if it may be shown
FACTS = ComponentFacts("dit", "blocks", (), (), blocks={"blocks": "depth"})


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, states: Tensor) -> Tensor:
        return states + self.linear(states).relu()


class Model(nn.Module):
    """Some blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, states: Tensor) -> Tensor:
        for block in self.blocks:
            states = block(states)
        return states


@pytest.fixture
def model():
    torch._dynamo.reset()
    yield Model()
    torch._dynamo.reset()


def train_on(model: Model, lengths: range) -> None:
    for length in lengths:
        model(torch.ones(length, 4)).sum().backward()


def test_each_of_twelve_shapes_is_compiled_once_for_each_kind_of_block(model):
    counter, names = CompileCounterWithBackend("eager"), list(model.state_dict())
    compile_blocks(FACTS, model, counter)
    train_on(model, range(2, 14))
    assert counter.frame_count == 12 * 2  # the input of the first block has no gradient
    train_on(model, range(2, 14))
    assert counter.frame_count == 12 * 2
    assert list(model.state_dict()) == names


def test_beyond_the_limit_it_fails(model, monkeypatch):
    monkeypatch.setattr(compilation, "MOST_COMPILATIONS", 4)
    compile_blocks(FACTS, model, "eager")
    train_on(model, range(2, 4))
    with pytest.raises(FailOnRecompileLimitHit):
        train_on(model, range(4, 5))


def test_a_block_that_is_no_whole_graph_fails(model):
    def forward(states: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return states

    model.blocks[0].forward = forward
    compile_blocks(FACTS, model, "eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        train_on(model, range(2, 3))

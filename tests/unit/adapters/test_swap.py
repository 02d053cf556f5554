"""Weights that wait in host memory: what is copied when, what a late use of a buffer shows, and what is computed."""

from collections import deque
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffsynth_core.adapters import swap as module
from diffsynth_core.adapters.float8 import Float8Format
from diffsynth_core.adapters.stored import PlainFormat, StoredLinear, WeightFormat
from diffsynth_core.adapters.streams import CopyStream
from diffsynth_core.adapters.swap import BlockSwap, FetchOrder, swaps_of

CPU = torch.device("cpu")
WIDTH, BLOCKS = 8, 5
BLOCK_BYTES = 2 * WIDTH * WIDTH * 4


class LateCopies(CopyStream):
    """Copies as late as their order allows: when the computation waits for one, after all before it."""

    def __init__(self) -> None:
        self.queue: deque[tuple[int, Tensor, Tensor]] = deque()
        self.log: list[tuple[str, int, int]] = []
        self.number = 0

    def computed(self) -> int:
        self.number += 1
        self.log.append(("computed", self.number, 0))
        return self.number

    def copy(self, target: Tensor, source: Tensor, after: int) -> int:
        self.number += 1
        self.queue.append((self.number, target, source))
        self.log.append(("copy", self.number, after))
        return self.number

    def wait(self, copied: int) -> None:
        self.log.append(("wait", copied, 0))
        while self.queue and self.queue[0][0] <= copied:
            _, target, source = self.queue.popleft()
            target.copy_(source)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fill what is given back with NaN, in every dtype; return the sizes."""
    given_back: list[int] = []
    monkeypatch.setattr(module, "give_back", lambda memory: given_back.append(memory.nbytes) or memory.fill_(0xFF))
    return given_back


def blocks(format: WeightFormat | None = None) -> nn.ModuleList:
    """Blocks of two frozen layers, which fetch their weights where there is a format."""
    torch.manual_seed(0)
    made = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(BLOCKS))
    made.requires_grad_(False)
    if format is None:
        return made
    for block in made:
        for index, layer in enumerate(block):
            block[index] = StoredLinear(layer, format, torch.float32)
    return made


def swapped(format: WeightFormat, chosen: tuple[int, ...]) -> tuple[nn.ModuleList, BlockSwap]:
    plain, made = blocks(), blocks(format)
    for index in set(range(BLOCKS)) - {*chosen}:
        made[index] = plain[index]
    swap = BlockSwap([list(made[index]) for index in chosen])
    for index in chosen:
        for layer, source in zip(made[index], plain[index], strict=True):
            tensors = format.pack(source.weight)
            assert tensors
            swap.fill(layer, tensors)
    return made, swap


def gradients(made: nn.ModuleList, recompute: bool, forwards: int = 1, shift: float = 0) -> Tensor:
    """Gradients of an input and of a weight behind each block."""
    torch.manual_seed(1)
    value = torch.randn(3, WIDTH, requires_grad=True)
    scales = [torch.ones(WIDTH, requires_grad=True) for _ in made]
    states = value + shift
    for _ in range(forwards):
        for block, scale in zip(made, scales, strict=True):
            states = checkpoint(block, states, use_reentrant=False) if recompute else block(states)
            states = torch.tanh(states * scale)
    states.sum().backward()
    return torch.stack([value.grad.sum(0), *(scale.grad for scale in scales)])


@pytest.mark.parametrize("late", [False, True], ids=["copied at once", "copied late"])
@pytest.mark.parametrize("chosen", [(2,), (1, 3), (0, 2, 4), (0, 1, 2, 3, 4)], ids=len)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("forwards", [1, 3])
def test_gradients_are_those_of_weights_on_the_device(forwards, recompute, chosen, late):
    made, swap = swapped(PlainFormat(), chosen)
    for shift in (0.0, 0.5, 1.0):
        swap.begin(CPU, LateCopies() if late else None)
        assert torch.equal(gradients(made, recompute, forwards, shift), gradients(blocks(), recompute, forwards, shift))


def test_buffers_take_turns_and_are_filled_with_nan_meanwhile(poisoned):
    made, swap = swapped(PlainFormat(), (0, 1, 2, 3, 4))
    for _ in range(3):
        swap.begin(CPU)
        gradients(made, recompute=True)
    assert swap.host_bytes == BLOCKS * BLOCK_BYTES and swap.device_bytes == 2 * BLOCK_BYTES
    assert set(poisoned) == {BLOCK_BYTES} and len(poisoned) > 3 * BLOCKS


def test_a_weight_used_late_is_nan():
    """Else the test above would prove nothing."""
    made, swap = swapped(PlainFormat(), (0, 1, 2))
    swap.begin(CPU, LateCopies())
    kept = made[0][0].fetch()["stored"]
    assert kept.isfinite().all()
    made[1][0].fetch()
    assert kept.isnan().all()


def test_copies_wait_for_the_last_use_of_their_buffer_and_uses_for_their_copy():
    made, swap = swapped(PlainFormat(), (0, 1, 2, 3))
    copies = LateCopies()
    swap.begin(CPU, copies)
    for index in (0, 1, 2, 3):
        for layer in made[index]:
            layer.fetch()
    # 1 and 2: the two buffers are made. Unit 0 is copied and waited for; 1 is copied into the other buffer meanwhile.
    assert copies.log == [
        ("computed", 1, 0), ("computed", 2, 0),
        ("copy", 3, 1), ("wait", 3, 0), ("copy", 4, 2),
        ("computed", 5, 0), ("wait", 4, 0), ("copy", 6, 5),  # 2 over 0, when 0 has been used
        ("computed", 7, 0), ("wait", 6, 0), ("copy", 8, 7),  # 3 over 1
        ("computed", 9, 0), ("wait", 8, 0),
    ]  # fmt: skip


def passes(count: int, forwards: int = 1) -> Callable[[FetchOrder], list[int | None]]:
    forward = list(range(count))

    def walk(order: FetchOrder) -> list[int | None]:
        units = forward * forwards + [*reversed(forward)] * forwards
        entered = [unit for place, unit in enumerate(units) if place == 0 or units[place - 1] != unit]
        first = order.begin()
        predicted = [first, *map(order.enter, entered)]
        return [one for one, seen in zip(predicted, [*entered, None], strict=True) if one != seen]

    return walk


@pytest.mark.parametrize("forwards", [1, 3])
def test_the_order_of_a_pass_is_known_from_the_one_before(forwards):
    order, walk = FetchOrder(4), passes(4, forwards)
    assert walk(order), "the first pass is guessed"
    assert walk(order) == walk(order) == []


def test_another_order_is_guessed_again_and_then_known():
    order = FetchOrder(4)
    passes(4)(order)
    assert passes(4, 2)(order)
    assert passes(4, 2)(order) == []


def test_the_first_pass_is_guessed_by_direction():
    order = FetchOrder(3)
    assert order.begin() is None
    assert [order.enter(unit) for unit in (0, 1, 2, 1, 0)] == [1, 2, None, 0, None]


@pytest.mark.parametrize("scaled", [False, True])
def test_all_tensors_of_a_format_wait(scaled):
    """A weight of the files with a scale per row beside one without, in one unit."""
    layers = [StoredLinear(nn.Linear(WIDTH, WIDTH), Float8Format(), torch.float32) for _ in range(2)]
    bytes_of = torch.randn(WIDTH, WIDTH).to(torch.float8_e4m3fn)
    scale = torch.rand(WIDTH, 1) if scaled else None
    swap = BlockSwap([layers])
    for layer in layers:
        swap.fill(layer, Float8Format().pack(bytes_of, scale if layer is layers[0] else None))
    expected = bytes_of.float() * (scale if scaled else 1)
    for layer, weight in zip(layers, (expected, bytes_of.float()), strict=True):
        assert torch.equal(layer.weight, weight), "before the first pass, where it waits"
    swap.begin(CPU)
    assert torch.equal(layers[0].weight, expected)


def test_what_waits_is_neither_parameter_nor_buffer():
    made, swap = swapped(Float8Format(), (0, 1))
    names = {name for name, _ in (*made.named_parameters(), *made.named_buffers())}
    assert "0.0.bias" in names and not {name for name in names if name.startswith("0.") and "bias" not in name}
    assert made.state_dict().keys() == names
    assert swaps_of(made) == [swap]

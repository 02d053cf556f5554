"""When copies between host and device are begun and waited for, beside the blocks of a whole model."""

from collections import deque
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffsynth_core.adapters.streams import CopyStream
from diffsynth_core.adapters.swap import swaps_of
from diffsynth_core.config.resolve import resolve
from diffsynth_core.models.qwen_image.tiny import TinySizes, write_tiny_weights
from diffsynth_core.planning.plan import make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.training.activations import LEAVING, OffloadActivations
from tests.conftest import MODEL_ID, PLACES
from tests.parity.float8_runs import Step

CPU, BLOCKS = torch.device("cpu"), 5


class LateCopies(CopyStream):
    """Copies as late as its order allows: when the computation waits for one, after all before it.

    `log` has copies and waits by the number of the copy, and whatever else is added, in the order of the computation.
    `returned`: number of a copy -> that of the one that brings the same tensor back.
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.returned: dict[int, int] = {}
        self._queue: deque[int] = deque()

    def computed(self) -> None:
        pass

    def copy(self, target: Tensor, source: Tensor, after: None) -> int:
        number = len(self.copies)
        self.returned |= {before: number for before, (copy, _) in enumerate(self.copies) if copy is source}
        self.copies.append((target, source))
        self._queue.append(number)
        self.log.append(("copy", number))
        return number

    def wait(self, copied: int) -> None:
        self.log.append(("wait", copied))
        while self._queue and self._queue[0] <= copied:
            target, source = self.copies[self._queue.popleft()]
            target.copy_(source)

    def places(self, what: str) -> dict[int, list[int]]:
        """Return where the log has something, by its number."""
        found: dict[int, list[int]] = {}
        for place, (name, number) in enumerate(self.log):
            if name == what:
                found.setdefault(number, []).append(place)
        return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen-Image with more blocks than two are."""
    folder = tmp_path_factory.mktemp("blocks")
    for component, place in PLACES.items():
        write_tiny_weights(folder, component, MODEL_ID, place, TinySizes(blocks=BLOCKS))
    return folder


@pytest.fixture
def open_step(base: Path, photographs: Path, tmp_path: Path) -> Callable[..., tuple[Step, LateCopies]]:
    """Return a step with gradient checkpointing, and copies whose log has each call of a block."""

    def open_step(**parameters: object) -> tuple[Step, LateCopies]:
        given = {"recipe": "qwen-image-lora", "dataset_base_path": str(photographs), "lora_rank": 4, "device": "cpu",
                 "dataset_num_workers": 0, "cache_path": str(tmp_path / "cache"), "output_path": str(tmp_path / "out"),
                 "use_gradient_checkpointing": True}  # fmt: skip
        step = Step(make_plan(resolve(given | parameters), SilentReporter(), base=base))
        copies = LateCopies()
        for number, block in enumerate(step.model.components["dit"].transformer_blocks):
            block.register_forward_pre_hook(lambda *_, number=number: copies.log.append(("block", number)))
        return step, copies

    return open_step


def test_inputs_of_blocks_leave_and_come_back_beside_the_computation(open_step):
    step, copies = open_step()
    plain = {name: gradient.clone() for name, gradient in step.gradients().items()}
    step.model.zero_grad()
    copies.log.clear()
    with OffloadActivations(copies):
        losses = step.model(step.micro_batch)
    losses.sum().backward()
    assert all(torch.equal(parameter.grad, plain[name]) for name, parameter in step.model.trained().items())

    begun, waited, blocks = (copies.places(what) for what in ("copy", "wait", "block"))
    forward, again = zip(*(blocks[number] for number in range(BLOCKS)), strict=True)
    away = [number for number in begun if number not in copies.returned.values()]
    for place, number in enumerate(away):  # until so many others are leaving, or the forward pass ends
        assert len(waited[number]) == 1
        assert waited[number][0] > begun[away[min(place + LEAVING, len(away) - 1)]][0]
        assert waited[number][0] < again[-1]
        assert all(waited[number][0] < begun[later][0] for later in away[place + LEAVING + 1 :])
    inputs = [[number for number in away if before < begun[number][0] < after] for before, after in pairwise(forward)]
    assert len(inputs[0]) > 1 and len({len(of_block) for of_block in inputs}) == 1
    for block, of_block in enumerate(inputs, 1):
        for number in of_block:
            (copied,), (needed,) = begun[copies.returned[number]], waited[copies.returned[number]]
            assert needed < again[block], "before it is recomputed"
            if block + 1 < BLOCKS:
                assert copied < again[block + 1] < needed, "while the one behind it is recomputed"


def test_weights_of_blocks_arrive_while_the_block_before_computes(open_step):
    plain, _ = open_step()
    step, copies = open_step(blocks_to_swap=BLOCKS)
    (swap,) = swaps_of(step.model)
    swap.begin(CPU, copies)
    expected, found = plain.gradients(), step.gradients()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    copies.log.clear()  # the order of the blocks is known by now
    step.gradients()

    block_of = {unit.memory.data_ptr(): block for block, unit in enumerate(swap._units)}
    used = set()
    for place, (what, number) in enumerate(copies.log):
        if what == "block":
            block, called = number, place
        elif what == "wait":
            assert block_of[copies.copies[number][1].data_ptr()] == block, "only once it is needed"
            assert ("copy", number) not in copies.log[called:], "it was begun before the block was called"
            used.add(block)
    assert used == set(range(BLOCKS))

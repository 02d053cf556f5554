"""What each of several processes holds of a run whose engine divides it. No torch.

Counted from the engines: FSDP2 gathers a block while it computes and the next one ahead, and what stands outside of
blocks for the whole step (training/engines/fsdp.py); DeepSpeed keeps a float32 copy of the trained numbers that a
process updates, and buffers in which it averages gradients (training/engines/zero.py).
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from diffsynth_core.models.block_swap import block_of
from diffsynth_core.models.size_facts import BYTES
from diffsynth_core.models.spec import FamilyFacts
from diffsynth_core.planning.machine.engines import EngineChoice

GATHERED_BLOCKS = 2
"""Blocks whose weights are whole at a time: one computes, and one is gathered ahead."""
REDUCE_BUCKET = 500_000_000
"""Numbers whose gradients DeepSpeed averages at once by default (`reduce_bucket_size`)."""
LIVE_NUMBERS = 1_000_000_000
"""Numbers of weights that DeepSpeed keeps gathered at most (`stage3_max_live_parameters`)."""


@dataclass(frozen=True)
class Shares:
    """How a run is divided: the engine, and among how many processes."""

    engine: EngineChoice
    processes: int

    def weights(self, size: int) -> int:
        """Bytes that a process holds of weights."""
        return self._part(size, self.engine.spec.shards_weights)

    def gradients(self, size: int) -> int:
        """Bytes that a process holds of gradients, after they were averaged."""
        return self._part(size, self.engine.spec.shards_gradients)

    def optimizer(self, size: int) -> int:
        """Bytes that a process holds of the state of the optimizer."""
        return self._part(size, self.engine.spec.shards_optimizer)

    def _part(self, size: int, divided: bool) -> int:
        return -(-size // self.processes) if divided else size

    def gathered(self, facts: FamilyFacts, sizes: Mapping[str, Mapping[str, int]]) -> int:
        """Bytes of weights that are whole on the device beside a process's part of all.

        Args:
            sizes: component -> module key -> bytes of each weight.
        """
        if not self.engine.spec.shards_weights:
            return 0
        whole = sum(sum(of_component.values()) for of_component in sizes.values())
        if self.engine.name == "zero3":
            return min(whole, LIVE_NUMBERS * BYTES["float32"])
        if not self.engine.reshards:
            return whole
        outside, largest = 0, 0
        for name, of_component in sizes.items():
            blocks: defaultdict[str | None, int] = defaultdict(int)
            for key, size in of_component.items():
                blocks[block_of(key, facts.component(name))] += size
            outside += blocks.pop(None, 0)
            largest = max([largest, *blocks.values()])
        return outside + GATHERED_BLOCKS * largest

    def buckets(self, facts: FamilyFacts, trained: Mapping[str, Mapping[str, int]], lora: int) -> int:
        """Bytes of gradients on the device that are not averaged or not divided yet.

        Args:
            trained: component -> module key -> bytes of the gradient of each weight that trains without LoRA.
            lora: bytes of the gradients of a LoRA.
        """
        if self.engine.spec.updates_copies:
            numbers = (lora + sum(sum(of_component.values()) for of_component in trained.values())) // BYTES["float32"]
            return BYTES["float32"] * min(numbers, REDUCE_BUCKET)
        return lora + self.gathered(facts, trained)

    def copies(self, trained_numbers: int) -> int:
        """Bytes of the float32 copy of trained weights that is updated in their place."""
        return self.optimizer(trained_numbers * BYTES["float32"]) if self.engine.spec.updates_copies else 0

"""Micro-batches in order, from any step on, for one process."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from diffsynth_core.data.batches import SampleRef
from diffsynth_core.models.family import Encoded
from diffsynth_core.planning.encodings import EncodingsPlan
from diffsynth_core.planning.plan import Plan
from diffsynth_core.training.encode import load_columns
from diffsynth_core.training.workers import iterate


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one shape that go through the model together.

    `encoded`: what the cache holds of each; `raw`: for each, what encoders in training read, by encoder.
    `counts`: False for a stand-in that keeps a process in step with the others and weighs nothing.
    """

    epoch: int
    refs: tuple[SampleRef, ...]
    encoded: tuple[Encoded, ...]
    raw: tuple[dict[str, dict[str, Any]], ...]
    counts: bool


@dataclass(frozen=True)
class _BatchIndex:
    epoch: int
    number: int
    counts: bool


def _batch_indices(plan: Plan, process: int) -> Iterator[_BatchIndex]:
    """The micro-batches of one process from the plan's first step on; lazily, so that their number costs nothing."""
    for step in range(plan.first_step, plan.steps.total_steps):
        part = plan.steps.slice(step)
        for start in range(part.start, part.stop, plan.world_size):
            own = start + process
            yield _BatchIndex(part.epoch, own, True) if own < part.stop else _BatchIndex(part.epoch, part.start, False)


class _MicroBatches(Dataset[MicroBatch]):
    """Micro-batches by place."""

    def __init__(self, plan: Plan, encodings: EncodingsPlan) -> None:
        self._plan, self._encodings = plan, encodings

    def __getitem__(self, place: _BatchIndex) -> MicroBatch:
        refs = self._plan.batches.batch(place.epoch, place.number)
        encoded = tuple(self._read(ref.sample) for ref in refs)
        raw = tuple(self._load(ref.sample) for ref in refs)
        return MicroBatch(place.epoch, tuple(refs), encoded, raw, place.counts)

    def _read(self, sample: int) -> Encoded:
        merged: Encoded = {}
        for part in self._encodings.encoders:
            if not part.online:
                merged.update(part.cache.read(part.keys[sample]))
        return merged

    def _load(self, sample: int) -> dict[str, dict[str, Any]]:
        return {
            part.encoder.name: load_columns(self._plan, part.encoder, self._plan.samples.samples[sample])
            for part in self._encodings.encoders
            if part.online
        }


def iterate_micro_batches(plan: Plan, encodings: EncodingsPlan, process: int) -> Iterator[MicroBatch]:
    """The micro-batches of one process, from the plan's first step to its last."""
    return iterate(_MicroBatches(plan, encodings), _batch_indices(plan, process), plan.parameters.dataset_num_workers)

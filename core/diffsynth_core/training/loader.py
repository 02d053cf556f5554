"""The micro-batches of one process in order, from any step on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from diffsynth_core.data.batches import SampleRef
from diffsynth_core.data.captions import draw_choice
from diffsynth_core.models.family import Encoded
from diffsynth_core.planning.data.encodings_plan import EncoderPlan
from diffsynth_core.planning.memory.estimate import KEPT_ENCODINGS
from diffsynth_core.planning.memory.sizes import largest_batch
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.training.encode import load_columns
from diffsynth_core.training.timesteps import Band
from diffsynth_core.training.workers import iterate


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one shape that pass through the model together.

    Attributes:
        encoded: cached encodings of each sample.
        raw: for each sample, the inputs of encoders in training, by encoder.
        counts: False for a stand-in with weight 0, which a process runs when the others still have a micro-batch: in
            distributed training all processes must run the same number of backward passes.
        band: the part of the timesteps that draws are from; None: all.
        numbers: by which the random numbers of each sample are drawn; None: its index in the dataset.
    """

    epoch: int
    refs: tuple[SampleRef, ...]
    encoded: tuple[Encoded, ...]
    raw: tuple[dict[str, dict[str, Any]], ...]
    counts: bool
    band: Band | None = None
    numbers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _BatchIndex:
    epoch: int
    number: int
    counts: bool


def _batch_indices(plan: RunPlan, process: int) -> Iterator[_BatchIndex]:
    """Yield the micro-batches of one process from the plan's first step on, lazily: there may be millions."""
    share = plan.machine.share(process)
    for step in range(plan.output.start.first_step, plan.data.steps.total_steps):
        part = plan.data.steps.slice(step)
        for start in range(part.start, part.stop, plan.machine.data_parallel):
            own = start + share
            yield _BatchIndex(part.epoch, own, True) if own < part.stop else _BatchIndex(part.epoch, part.start, False)


class MicroBatches(Dataset[MicroBatch]):
    """Micro-batches by index.

    Encodings that were read stay in memory, up to a limit: those of a small dataset are read and verified once.
    """

    def __init__(self, plan: RunPlan, room: int | None = None) -> None:
        """`room`: limit in bytes; default: `KEPT_ENCODINGS`."""
        self._plan = plan
        self._kept: dict[str, Encoded] = {}
        self._room = (KEPT_ENCODINGS if room is None else room) // max(1, plan.parameters.dataset_num_workers)

    def __getitem__(self, index: _BatchIndex) -> MicroBatch:
        refs = self._plan.data.steps.batches.batch(index.epoch, index.number)
        choices = [self._choice(index.epoch, ref) for ref in refs]
        return self.load(index.epoch, refs, choices, index.counts)

    def load(self, epoch: int, refs: Sequence[SampleRef], choices: Sequence[int], counts: bool) -> MicroBatch:
        """Load samples, each with one of the texts that it may be trained with (`Sample.choices`)."""
        encoded = tuple(self._read(ref.sample, choice) for ref, choice in zip(refs, choices, strict=True))
        raw = tuple(self._load(ref.sample, choice) for ref, choice in zip(refs, choices, strict=True))
        return MicroBatch(epoch, tuple(refs), encoded, raw, counts)

    def _choice(self, epoch: int, ref: SampleRef) -> int:
        """Which of its captions a sample is trained with, if with any."""
        captions = len(self._plan.data.samples.samples[ref.sample].captions)
        params = self._plan.parameters
        return draw_choice(captions, params.caption_dropout, params.seed, epoch, ref.sample, ref.repeat)

    def _read(self, sample: int, choice: int) -> Encoded:
        merged: Encoded = {}
        for part in self._plan.encodings.encoders:
            if not part.online:
                merged.update(self._read_part(part, part.key(sample, choice)))
        return merged

    def _read_part(self, part: EncoderPlan, key: str) -> Encoded:
        if kept := self._kept.get(key):
            return kept
        encoded = part.cache.read(key)
        size = sum(tensor.nbytes for tensor in encoded.values())
        if size <= self._room:
            self._room -= size
            self._kept[key] = encoded
        return encoded

    def _load(self, sample: int, choice: int) -> dict[str, dict[str, Any]]:
        return {
            part.encoder.name: load_columns(self._plan, part.encoder, self._plan.data.samples.samples[sample], choice)
            for part in self._plan.encodings.encoders
            if part.online
        }


def load_largest_micro_batch(plan: RunPlan) -> MicroBatch:
    """Load the largest micro-batch that the samples of the plan's steps may form, each with its longest caption.

    Steps may never draw just these samples together, but none is larger.
    """
    samples = plan.data.samples.samples
    needed = plan.data.steps.samples_needed(plan.output.start.first_step)
    refs = largest_batch(plan, needed)
    captions = [samples[ref.sample].captions for ref in refs]
    choices = [max(range(len(given)), key=lambda choice: len(given[choice])) for given in captions]
    return MicroBatches(plan).load(0, refs, choices, counts=True)


def iterate_micro_batches(plan: RunPlan, process: int) -> Iterator[MicroBatch]:
    """Yield the micro-batches of one process from the plan's first step to the last."""
    return iterate(MicroBatches(plan), _batch_indices(plan, process), plan.parameters.dataset_num_workers)

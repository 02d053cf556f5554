"""Assignment of samples to batches as a pure function of the batch number. No torch.

Samples of one shape form a bucket. An epoch passes `repeat` times over the dataset; each pass over a bucket has its
own order. Batches are consecutive in a bucket's passes, and the batches of all buckets are mixed within about one
pass, so that any section of an epoch contains all buckets and every sample equally often. Nothing is enumerated:
number and content of an epoch's batches cost the same at any `repeat`.
"""

from bisect import bisect_right
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from diffsynth_core.randomness import key_of, permute


@dataclass(frozen=True)
class SampleRef:
    """One sample (its index in the dataset) in one pass of an epoch."""

    sample: int
    repeat: int


@dataclass(frozen=True)
class Bucket:
    """Samples of one shape."""

    shape: Hashable
    members: tuple[int, ...]


@dataclass(frozen=True)
class _Pass:
    """About one pass over all buckets: its first batch, and the end of each bucket's batches within it."""

    number: int
    first: int
    ends: tuple[int, ...]


class BatchPlan:
    """All batches of all epochs."""

    def __init__(
        self, shapes: Sequence[Hashable], repeat: int, batch_size: int, seed: int, held_out: Collection[int] = ()
    ) -> None:
        """Plan the batches of all samples but those that are held out, by index."""
        members: dict[Hashable, list[int]] = {}
        self.members = [index for index in range(len(shapes)) if index not in held_out]
        for index in self.members:
            members.setdefault(shapes[index], []).append(index)
        self.buckets = tuple(Bucket(shape, tuple(indices)) for shape, indices in members.items())
        self.samples_per_epoch = len(self.members) * repeat
        self._repeat = repeat
        self._batch_size = batch_size
        self._seed = seed
        self._batches = [-(-len(bucket.members) * repeat // batch_size) for bucket in self.buckets]
        self.batches_per_epoch = sum(self._batches)
        self._last_pass: _Pass | None = None

    def batch(self, epoch: int, number: int) -> list[SampleRef]:
        """Return the samples of batch `number` (from 0) of an epoch.

        Raises:
            IndexError: if the epoch has no such batch.
        """
        bucket_number, start, stop = self._locate(epoch, number)
        members = self.buckets[bucket_number].members
        refs = []
        for position in range(start, stop):
            repeat, place = divmod(position, len(members))
            order = key_of("order", self._seed, epoch, bucket_number, repeat)
            refs.append(SampleRef(members[permute(place, len(members), order)], repeat))
        return refs

    def size(self, epoch: int, number: int) -> int:
        """Return the number of samples of batch `number` of an epoch."""
        _, start, stop = self._locate(epoch, number)
        return stop - start

    def _locate(self, epoch: int, number: int) -> tuple[int, int, int]:
        """Return (bucket, first position, position after the last) of a batch."""
        if not 0 <= number < self.batches_per_epoch:
            raise IndexError(f"batch {number} of {self.batches_per_epoch}")
        current = self._pass_with(number)
        place = permute(number - current.first, current.ends[-1], key_of("mix", self._seed, epoch, current.number))
        bucket_number = bisect_right(current.ends, place)
        place_in_bucket = place - (current.ends[bucket_number - 1] if bucket_number else 0)
        batch_in_bucket = self._share(self._batches[bucket_number], current.number) + place_in_bucket
        start = batch_in_bucket * self._batch_size
        end_of_bucket = len(self.buckets[bucket_number].members) * self._repeat
        return bucket_number, start, min(start + self._batch_size, end_of_bucket)

    def _pass_with(self, number: int) -> "_Pass":
        """Return the pass of a batch; the last one is cached, because batches are requested in order."""
        current = self._last_pass
        if current is None or not current.first <= number < current.first + current.ends[-1]:
            pass_number = self._pass_at(number)
            shares = (self._share(count, pass_number + 1) - self._share(count, pass_number) for count in self._batches)
            current = _Pass(pass_number, self._batches_before(pass_number), tuple(accumulate(shares)))
            self._last_pass = current
        return current

    def _share(self, count: int, pass_number: int) -> int:
        """Return the number of a bucket's `count` batches before a pass; an epoch has `repeat` passes."""
        return count * pass_number // self._repeat

    def _batches_before(self, pass_number: int) -> int:
        return sum(self._share(count, pass_number) for count in self._batches)

    def _pass_at(self, number: int) -> int:
        low, high = 0, self._repeat - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._batches_before(middle) <= number else (low, middle - 1)
        return low


@dataclass(frozen=True)
class StepSlice:
    """The micro-batches of one optimizer step over all processes: numbers `start` to `stop` of one epoch."""

    epoch: int
    start: int
    stop: int


@dataclass(frozen=True)
class StepPlan:
    """Assignment of micro-batches to optimizer steps, which do not cross epochs.

    Attributes:
        micro_batches: per step over all processes: gradient accumulation x processes / context_parallel.
    """

    batches: BatchPlan
    micro_batches: int
    num_epochs: int
    max_steps: int | None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-self.batches.batches_per_epoch // self.micro_batches)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        every = self.steps_per_epoch * self.num_epochs
        return every if self.max_steps is None else min(every, self.max_steps)

    def slice(self, step: int) -> StepSlice:
        """Return the micro-batches of `step` (from 0)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.micro_batches
        stop = min(start + self.micro_batches, self.batches.batches_per_epoch)
        return StepSlice(epoch, start, stop)

    def samples_in(self, part: StepSlice) -> int:
        """Return the number of samples in the micro-batches of a step."""
        return sum(self.batches.size(part.epoch, number) for number in range(part.start, part.stop))

    def samples_needed(self, first_step: int) -> list[int]:
        """Return the sorted indices of the samples that steps from `first_step` on will use."""
        if first_step % self.steps_per_epoch == 0 and self.total_steps - first_step >= self.steps_per_epoch:
            return self.batches.members
        seen: set[int] = set()
        for step in range(first_step, self.total_steps):
            part = self.slice(step)
            for number in range(part.start, part.stop):
                seen.update(ref.sample for ref in self.batches.batch(part.epoch, number))
            if len(seen) == len(self.batches.members):
                break
        return sorted(seen)

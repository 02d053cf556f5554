"""The micro-batches of all processes: the same samples in the same steps, however they are distributed."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.data.batches import BatchPlan, SampleRef, StepPlan
from diffsynth_core.data.cache import EncodingCache
from diffsynth_core.data.samples import SampleSet
from diffsynth_core.planning.data.encodings_plan import EncoderPlan, EncodingRef, EncodingsPlan
from diffsynth_core.planning.output.folder import ResumePoint
from diffsynth_core.planning.plan import DataPlan, Machine, OutputPlan, RunPlan
from diffsynth_core.training import loader
from diffsynth_core.training.loader import MicroBatch, iterate_micro_batches

SHAPES = ["a"] * 7 + ["b"] * 4
NOTHING_TO_ENCODE = EncodingsPlan((), {})


def plan_of(
    accumulation: int,
    world_size: int,
    first_step: int = 0,
    workers: int = 0,
    encodings: EncodingsPlan = NOTHING_TO_ENCODE,
) -> RunPlan:
    """A plan without the fields that the loader does not use; by default with nothing to encode."""
    steps = StepPlan(BatchPlan(SHAPES, 3, 2, seed=1), accumulation * world_size, 2, None)
    nothing: Any = None
    samples = SampleSet(tuple(SimpleNamespace(captions=("a caption",)) for _ in SHAPES), ())
    parameters = Parameters(dataset_num_workers=workers)
    return RunPlan(
        parameters=parameters,
        model=nothing,
        data=DataPlan(samples=samples, steps=steps, fingerprint=""),
        training=nothing,
        output=OutputPlan(start=ResumePoint(first_step), cache=nothing),
        machine=Machine(device="cpu", mixed_precision="no", world_size=world_size),
        found_encodings=encodings,
    )


def batches_of(plan: RunPlan, process: int) -> list[MicroBatch]:
    return list(iterate_micro_batches(plan, process))


def steps_of(accumulation: int, world_size: int) -> list[list[tuple[int, tuple[SampleRef, ...]]]]:
    """Return the micro-batches of each step that count, over all processes, in the order of the plan."""
    plan = plan_of(accumulation, world_size)
    streams = [iter(batches_of(plan, process)) for process in range(world_size)]
    steps = []
    for step in range(plan.data.steps.total_steps):
        part = plan.data.steps.slice(step)
        rounds = -(-(part.stop - part.start) // world_size)
        fetched = [next(stream) for _ in range(rounds) for stream in streams]
        steps.append([(batch.epoch, batch.refs) for batch in fetched if batch.counts])
    assert [next(stream, None) for stream in streams] == [None] * world_size
    return steps


@pytest.mark.parametrize(("accumulation", "world_size"), [(2, 2), (1, 4)])
def test_a_step_has_the_same_samples_however_it_is_shared(accumulation, world_size):
    assert steps_of(accumulation, world_size) == steps_of(4, 1)


def test_an_epoch_that_does_not_divide_keeps_all_its_samples():
    seen = [item for step in steps_of(1, 4) for epoch, items in step for item in items if epoch == 0]
    assert len(seen) == len(set(seen)) == len(SHAPES) * 3


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_all_processes_do_the_same_number_of_passes(world_size):
    plan = plan_of(1, world_size)
    assert len({len(batches_of(plan, process)) for process in range(world_size)}) == 1


@pytest.mark.parametrize("first_step", [1, 4, 5, 9])
def test_a_later_start_sees_the_rest_of_the_same_sequence(first_step):
    every, rest = batches_of(plan_of(1, 2), 1), batches_of(plan_of(1, 2, first_step), 1)
    assert 0 < len(rest) < len(every)
    assert rest == every[-len(rest) :]
    assert len(rest) == plan_of(1, 2).data.steps.total_steps - first_step


def test_workers_change_nothing():
    assert batches_of(plan_of(2, 1, workers=2), 0) == batches_of(plan_of(2, 1), 0)


class CountedReads(EncodingCache):
    """A cache that records which entries are read."""

    reads: list[str]

    def read(self, key: str) -> dict[str, torch.Tensor]:
        self.reads.append(key)
        return super().read(key)


@pytest.mark.parametrize("kept", [len(SHAPES), 4])
def test_encodings_are_read_once_as_far_as_they_have_room(tmp_path, monkeypatch, kept):
    latents = {f"{sample:04}": torch.full((2, 3), float(sample)) for sample in range(len(SHAPES))}
    monkeypatch.setattr(loader, "KEPT_ENCODINGS", kept * latents["0000"].nbytes)
    cache = CountedReads(tmp_path)
    cache.reads = []
    for key, tensor in latents.items():
        cache.write(key, {"latents": tensor})
    nothing: Any = None
    keys = {EncodingRef(sample): key for sample, key in enumerate(latents)}
    part = EncoderPlan(nothing, online=False, cache=cache, keys=keys, missing=())
    batches = batches_of(plan_of(1, 1, encodings=EncodingsPlan((part,), {})), 0)
    for batch in batches:
        for ref, encoded in zip(batch.refs, batch.encoded, strict=True):
            assert torch.equal(encoded["latents"], latents[f"{ref.sample:04}"])
    seen = sum(len(batch.refs) for batch in batches)
    assert len(cache.reads) == kept + (seen // len(SHAPES)) * (len(SHAPES) - kept)


def test_processes_that_compute_a_sample_together_load_the_same():
    four = plan_of(1, 2)
    four = replace(four, machine=replace(four.machine, world_size=4, context_parallel=2))
    for process in range(4):
        assert batches_of(four, process) == batches_of(plan_of(1, 2), process // 2)

"""Batches and steps as pure functions of their number: complete, of one shape, mixed, however they are distributed."""

import time
from collections import Counter
from itertools import pairwise

import pytest

from diffsynth_core.data.batches import BatchPlan, StepPlan

MIXES = [
    pytest.param(["a"], 1, 1, id="one sample"),
    pytest.param(["a"], 5, 3, id="one sample, batches over passes"),
    pytest.param(["a"] * 7, 3, 2, id="one bucket"),
    pytest.param(["a", "b", "a", "c", "b", "a"], 4, 1, id="three buckets"),
    pytest.param(["a", "b", "a", "c", "b", "a"], 4, 2, id="three buckets in pairs"),
    pytest.param(["a"] * 13 + ["b"], 10, 4, id="a rare shape"),
    pytest.param(["a"] * 3 + ["b"] * 50 + ["c"] * 11, 2, 8, id="batches larger than a bucket"),
    pytest.param(["a", "b"], 6, 100, id="batches larger than the epoch"),
    pytest.param(["a"] * 5 + ["b"] * 5, 1, 5, id="exact batches"),
    pytest.param([f"s{number}" for number in range(9)], 3, 2, id="every sample a shape"),
]


def epoch_of(plan: BatchPlan, epoch: int = 0) -> list[list[tuple[int, int]]]:
    """Return all batches of an epoch as (sample, repeat)."""
    return [
        [(item.sample, item.repeat) for item in plan.batch(epoch, number)] for number in range(plan.batches_per_epoch)
    ]


@pytest.mark.parametrize(("shapes", "repeat", "batch_size"), MIXES)
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_holds_every_sample_of_every_pass_once(shapes, repeat, batch_size, epoch):
    seen = Counter(item for batch in epoch_of(BatchPlan(shapes, repeat, batch_size, seed=1), epoch) for item in batch)
    assert seen == Counter((sample, turn) for sample in range(len(shapes)) for turn in range(repeat))


@pytest.mark.parametrize(("shapes", "repeat", "batch_size"), MIXES)
def test_a_batch_never_mixes_shapes(shapes, repeat, batch_size):
    for batch in epoch_of(BatchPlan(shapes, repeat, batch_size, seed=1)):
        assert len({shapes[sample] for sample, _ in batch}) == 1
        assert 1 <= len(batch) <= batch_size


@pytest.mark.parametrize(("shapes", "repeat", "batch_size"), MIXES)
def test_size_tells_what_batch_holds(shapes, repeat, batch_size):
    plan = BatchPlan(shapes, repeat, batch_size, seed=2)
    assert [plan.size(1, number) for number in range(plan.batches_per_epoch)] == [len(b) for b in epoch_of(plan, 1)]


@pytest.mark.parametrize(("shapes", "repeat", "batch_size"), MIXES)
def test_an_epoch_has_as_few_batches_as_its_buckets_allow(shapes, repeat, batch_size):
    plan = BatchPlan(shapes, repeat, batch_size, seed=1)
    needed = sum(-(-count * repeat // batch_size) for count in Counter(shapes).values())
    assert plan.batches_per_epoch == needed
    assert plan.samples_per_epoch == len(shapes) * repeat
    for outside in (-1, needed):
        with pytest.raises(IndexError):
            plan.batch(0, outside)


def test_buckets_are_listed_with_their_members():
    plan = BatchPlan(["a", "b", "a"], 1, 1, seed=0)
    assert [(bucket.shape, bucket.members) for bucket in plan.buckets] == [("a", (0, 2)), ("b", (1,))]


def test_each_pass_sees_every_sample_once_when_batches_hold_one():
    shapes = ["a"] * 5 + ["b"] * 2 + ["c"]
    batches = epoch_of(BatchPlan(shapes, 6, 1, seed=4))
    for turn in range(6):
        seen = [batch[0] for batch in batches[8 * turn : 8 * turn + 8]]
        assert sorted(seen) == [(sample, turn) for sample in range(8)]


@pytest.mark.parametrize(
    ("shapes", "repeat", "batch_size"), [(["a"] * 40 + ["b"] * 8, 12, 4), (["a"] * 90 + ["b"] * 30, 8, 5)]
)
def test_any_stretch_as_long_as_a_pass_sees_all_buckets_in_proportion(shapes, repeat, batch_size):
    plan = BatchPlan(shapes, repeat, batch_size, seed=3)
    kinds = [shapes[batch[0][0]] for batch in epoch_of(plan)]
    per_pass = plan.batches_per_epoch // repeat
    for start in range(len(kinds) - 2 * per_pass):
        assert set(kinds[start : start + 2 * per_pass]) == set(shapes)
    for turn in range(repeat):
        assert Counter(kinds[turn * per_pass : (turn + 1) * per_pass]) == Counter(shapes[::batch_size])


def test_buckets_are_mixed_within_a_pass_instead_of_following_each_other():
    shapes = ["a"] * 30 + ["b"] * 30
    kinds = [shapes[batch[0][0]] for batch in epoch_of(BatchPlan(shapes, 1, 1, seed=0))]
    changes = sum(one != other for one, other in pairwise(kinds))
    assert changes > 15


def test_passes_epochs_buckets_and_seeds_have_orders_of_their_own():
    shapes = ["a"] * 20 + ["b"] * 20  # with batches as large as a bucket, a batch is the order of one pass

    def orders(seed: int, epoch: int) -> dict[tuple[str, int], tuple[int, ...]]:
        batches = epoch_of(BatchPlan(shapes, 2, 20, seed), epoch)
        return {(shapes[batch[0][0]], batch[0][1]): tuple(sample % 20 for sample, _ in batch) for batch in batches}

    every = [*orders(0, 0).values(), *orders(0, 1).values(), *orders(1, 0).values()]
    assert len(every) == len(set(every)) == 12
    assert orders(0, 0) == orders(0, 0)


def test_passes_epochs_and_seeds_mix_their_buckets_in_ways_of_their_own():
    shapes = ["a"] * 20 + ["b"] * 20
    every = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        kinds = "".join(shapes[batch[0][0]] for batch in epoch_of(BatchPlan(shapes, 2, 1, seed), epoch))
        every += [kinds[:40], kinds[40:]]
    assert len(set(every)) == 6


@pytest.mark.timeout(30)
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_a_huge_repeat_costs_nothing(batch_size):
    started = time.perf_counter()
    repeat = 10**12
    plan = BatchPlan(["a", "b", "a", "a", "b"], repeat, batch_size, seed=0)
    steps = StepPlan(plan, 8, 2, None)
    assert plan.batches_per_epoch == -(-3 * repeat // batch_size) + -(-2 * repeat // batch_size)
    for number in (0, plan.batches_per_epoch // 2, plan.batches_per_epoch - 1):
        assert 1 <= len(plan.batch(0, number)) == plan.size(0, number) <= batch_size
    assert steps.slice(steps.total_steps - 1).stop == plan.batches_per_epoch
    assert steps.samples_needed(0) == [0, 1, 2, 3, 4]
    assert steps.samples_needed(steps.total_steps // 3) == [0, 1, 2, 3, 4]
    assert time.perf_counter() - started < 5


STEP_PLANS = [(micro, epochs) for micro in (1, 2, 3, 4, 7, 100) for epochs in (1, 3)]


@pytest.mark.parametrize(("micro_batches", "num_epochs"), STEP_PLANS)
def test_steps_cover_all_batches_once_and_do_not_cross_epochs(micro_batches, num_epochs):
    plan = BatchPlan(["a"] * 9 + ["b"] * 4, 2, 2, seed=0)
    steps = StepPlan(plan, micro_batches, num_epochs, None)
    slices = [steps.slice(step) for step in range(steps.total_steps)]
    covered = [(part.epoch, number) for part in slices for number in range(part.start, part.stop)]
    assert covered == [(epoch, number) for epoch in range(num_epochs) for number in range(plan.batches_per_epoch)]
    assert all(1 <= part.stop - part.start <= micro_batches for part in slices)
    assert [step for step, part in enumerate(slices, 1) if part.stop == plan.batches_per_epoch] == [
        steps.steps_per_epoch * epoch for epoch in range(1, num_epochs + 1)
    ]
    assert sum(steps.samples_in(part) for part in slices) == num_epochs * plan.samples_per_epoch


@pytest.mark.parametrize(("max_steps", "total"), [(None, 14), (1, 1), (14, 14), (100, 14)])
def test_max_steps_only_shortens(max_steps, total):
    plan = BatchPlan(["a"] * 7, 2, 1, seed=0)
    assert StepPlan(plan, 2, 2, max_steps).total_steps == total


@pytest.mark.parametrize("max_steps", [None, 1, 3, 5, 12])
@pytest.mark.parametrize("first_step", [0, 1, 4, 5, 8])
def test_samples_needed_are_those_the_remaining_steps_see(first_step, max_steps):
    plan = BatchPlan(["a"] * 7 + ["b"] * 3, 1, 1, seed=5)
    steps = StepPlan(plan, 2, 2, max_steps)
    seen = {
        item.sample
        for step in range(first_step, steps.total_steps)
        for number in range(steps.slice(step).start, steps.slice(step).stop)
        for item in plan.batch(steps.slice(step).epoch, number)
    }
    assert steps.samples_needed(first_step) == sorted(seen)

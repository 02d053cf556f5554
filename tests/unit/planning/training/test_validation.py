"""Which samples are held out, and how often they are measured."""

import pytest

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.data.batches import BatchPlan, StepPlan
from diffsynth_core.planning.data.held_out import share_to_hold_out
from diffsynth_core.planning.training.validation import count_validations, validation_is_due
from diffsynth_core.training.timesteps import Band


class Planned:
    """The part of a plan that is read."""

    def __init__(self, steps: StepPlan, **parameters: object) -> None:
        self.parameters = Parameters(validation_split="0.1", **parameters)
        self.data = self
        self.steps, self.held_out = steps, (0,)


@pytest.mark.parametrize("total", [1, 7, 12, 20])
@pytest.mark.parametrize(("save_steps", "every"), [(None, None), (None, 3), (4, None), (4, 6), (50, 3), (4, 50)])
def test_as_many_validations_are_counted_as_are_due(total, save_steps, every):
    plan = Planned(StepPlan(BatchPlan(["a"] * 5, 1, 1, 0), 1, 99, total), save_steps=save_steps, validate_every=every)
    for first in range(total):
        due = [done for done in range(first + 1, total + 1) if validation_is_due(plan, done)]
        assert count_validations(plan, first, total) == len(due), (first, due)


@pytest.mark.parametrize(("count", "share", "held"), [(4, "0.25", 1), (100, "0.05", 5), (10, "0.01", 1), (7, "0.5", 4)])
def test_a_share_is_held_out_by_seed_and_number_of_samples(count, share, held):
    class Samples:
        samples = tuple(range(count))

    def indices(seed: int) -> tuple[int, ...]:
        return share_to_hold_out(Parameters(validation_split=share, seed=seed), Samples())

    found = indices(0)
    assert len(found) == held and list(found) == sorted(set(found)) and found[-1] < count
    assert indices(0) == found and len({indices(seed) for seed in range(20)}) > 1
    plan = BatchPlan(["a", "b"] * count, 2, 1, 0, found)
    seen = {ref.sample for number in range(plan.batches_per_epoch) for ref in plan.batch(0, number)}
    assert seen == set(range(2 * count)) - set(found)


@pytest.mark.parametrize("indices", [range(1000), range(300, 307), range(4)])
def test_bands_are_parts_of_the_timesteps(indices):
    parts = [Band(number, 4).of(indices) for number in range(4)]
    assert [index for part in parts for index in part] == list(indices) and all(parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1

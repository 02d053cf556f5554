"""Timesteps by hand: the range that parameters select, and draws that are pure functions of their keys."""

import pytest

from diffsynth_core.training.timesteps import draw_uniform, timestep_range

ALL = range(1000)


@pytest.mark.parametrize(
    ("low", "high", "first", "behind"),
    [
        (0.0, 1.0, 0, 1000),
        (0.0, 0.417, 0, 417),
        (0.417, 1.0, 417, 1000),
        (0.358, 1.0, 358, 1000),
        (0.2995, 0.3055, 299, 305),
        (0.999, 1.0, 999, 1000),
        (0.1, 0.101, 100, 101),
    ],
)
def test_timesteps_cover_exactly_their_range(low, high, first, behind):
    count = behind - first
    drawn = [draw_uniform((0, 0, sample, 0), timestep_range(low, high)) for sample in range(30 * count)]
    assert set(drawn) == set(range(first, behind))


@pytest.mark.parametrize("thousandth", range(1, 1000, 7))
def test_bounds_given_in_thousandths_are_exact(thousandth):
    assert timestep_range(thousandth / 1000, (thousandth + 1) / 1000) == range(thousandth, thousandth + 1)


def test_timesteps_are_uniform_enough():
    draws = 50_000
    counts = [0] * 1000
    for sample in range(draws):
        counts[draw_uniform((3, 1, sample, 2), ALL)] += 1
    expected = draws / 1000
    chi_square = sum((count - expected) ** 2 / expected for count in counts)
    assert 999 - 5 * 45 < chi_square < 999 + 5 * 45  # 999 degrees of freedom, standard deviation 44.7


@pytest.mark.parametrize("changed", range(4))
def test_a_timestep_depends_on_every_part_of_its_key(changed):
    keys = [tuple(number if place == changed else 5 for place in range(4)) for number in range(50)]
    draws = [draw_uniform(key, ALL) for key in keys]
    assert len(set(draws)) > 40
    assert draws == [draw_uniform(key, ALL) for key in keys]


def test_the_seed_may_be_as_large_as_the_parameter_allows():
    assert 0 <= draw_uniform((2**63 - 1, 10**9, 10**9, 10**12), ALL) < 1000

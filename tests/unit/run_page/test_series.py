"""The metrics of the steps, smoothed and reduced to the points of a chart."""

import math

import pytest

from diffsynth_core.run_page.series import Point, StepSeries, downsample, smooth, smoothing_steps


def test_every_spike_is_in_the_range_of_a_point():
    values = [1.0] * 100_000
    values[61_234] = 9.0
    points = downsample(range(1, 100_001), values, 600)
    assert len(points) == 599 and {point.high for point in points} == {1.0, 9.0}
    (spike,) = (point for point in points if point.high == 9)
    assert spike.first <= 61_235 <= spike.last and spike.low == 1 and 1 < spike.mean < 1.1
    assert [point.first for point in points[1:]] == [point.last + 1 for point in points[:-1]]
    assert (points[0].first, points[-1].last) == (1, 100_000)


def test_few_values_stay_as_they_are():
    assert downsample([3, 5], [1.0, 2.0]) == [Point(3, 3, 1, 1, 1), Point(5, 5, 2, 2, 2)]
    assert downsample([], []) == []


def test_what_is_not_finite_is_left_out_of_a_point():
    first, second = downsample(range(4), [1.0, math.nan, math.inf, math.nan], 2)
    assert (first.low, first.mean, first.high) == (1, 1, 1)
    assert all(map(math.isnan, (second.low, second.mean, second.high)))


def test_the_average_starts_as_the_mean_and_forgets():
    assert list(smooth([2.0, 4.0, math.nan, 6.0], 10)) == [2, 3, 3, 4]
    assert smooth([1.0] * 100 + [2.0] * 100, 10)[-1] == pytest.approx(2, abs=1e-3)
    assert (smoothing_steps(100), smoothing_steps(10_000)) == (10, 200)


@pytest.mark.parametrize("value", [None, "1", True, [1], 10**400, math.nan])
def test_what_is_not_a_number_is_not_finite(value):
    series = StepSeries()
    series.add(1, {"loss": value})
    series.add(2, {"loss": 0.5, "seconds": 2})
    assert not math.isfinite(series["loss"][0]) and series.last("loss") == 0.5
    assert (series.mean_of_last("loss", 2), series.sum_until("seconds", 2), series.sum_until("seconds", 1)) == (
        0.5,
        2,
        0,
    )

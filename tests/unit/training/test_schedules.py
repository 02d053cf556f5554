"""The learning rate as a pure function of the step."""

from typing import get_args

import pytest

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.training.schedules import SCHEDULES, learning_rate

BASE = 1e-4


def rates(scheduler: str, warmup: int, total: int) -> list[float]:
    return [learning_rate(step, BASE, scheduler, warmup, total) / BASE for step in range(total)]


@pytest.mark.parametrize(
    ("scheduler", "warmup", "total", "expected"),
    [
        ("constant", 0, 4, [1, 1, 1, 1]),
        ("constant", 2, 4, [0.5, 1, 1, 1]),
        ("constant", 4, 5, [0.25, 0.5, 0.75, 1, 1]),
        ("linear", 0, 4, [1, 0.75, 0.5, 0.25]),
        ("linear", 2, 6, [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", 0, 4, [1, 0.8535533905932737, 0.5, 0.14644660940672627]),
        ("cosine", 1, 5, [1, 1, 0.8535533905932737, 0.5, 0.14644660940672627]),
        ("linear", 0, 1, [1]),
        ("cosine", 3, 3, [1 / 3, 2 / 3, 1]),
        ("linear", 10, 3, [0.1, 0.2, 0.3]),
    ],
)
def test_rates_by_hand(scheduler, warmup, total, expected):
    assert rates(scheduler, warmup, total) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_no_step_is_lost_and_none_goes_above_the_asked_rate(scheduler, warmup):
    found = rates(scheduler, warmup, 100)
    assert all(0 < rate <= 1 for rate in found)
    assert found[:warmup] == sorted(found[:warmup])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
    assert found[max(0, warmup - 1)] == 1


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_a_falling_rate_comes_to_nothing_behind_the_last_step(scheduler):
    assert learning_rate(50, BASE, scheduler, 10, 50) == pytest.approx(0, abs=1e-18)


def test_the_table_has_what_the_parameter_accepts():
    assert set(SCHEDULES) == set(get_args(Parameters.model_fields["lr_scheduler"].annotation))

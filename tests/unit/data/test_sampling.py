"""Sampler parameters of rows for direct distillation: numbers in csv and json, everything else reported."""

import pytest

from diffsynth_core.data.sampling import Sampling, read_sampling
from diffsynth_core.errors import FaultsFound
from tests.naming import names

ROW = {"seed": "42", "rand_device": "cpu", "num_inference_steps": "4", "cfg_scale": "1"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Sampling(42, "cpu", 4)),
        ({"seed": 42, "num_inference_steps": 4, "cfg_scale": 1.0}, Sampling(42, "cpu", 4)),
        ({"seed": "42.0", "num_inference_steps": " 4 ", "cfg_scale": "1.0"}, Sampling(42, "cpu", 4)),
        ({"seed": "9007199254740993"}, Sampling(9007199254740993, "cpu", 4)),
        ({"seed": 9007199254740993}, Sampling(9007199254740993, "cpu", 4)),
        ({"seed": 0, "rand_device": "cuda", "num_inference_steps": 1}, Sampling(0, "cuda", 1)),
    ],
)
def test_rows_that_can_be_read(changes, expected):
    assert read_sampling(ROW | changes, "row 1") == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": ""}, names("row 1", "seed", "is empty", "integer from 0 to 9223372036854775807")),
        ({"seed": None}, names("row 1", "seed", "is empty", "integer from 0 to 9223372036854775807")),
        ({"seed": "-1"}, names("row 1", "seed", "-1", "integer from 0 to 9223372036854775807")),
        ({"seed": 1.5}, names("row 1", "seed", "1.5", "integer from 0 to 9223372036854775807")),
        ({"seed": True}, names("row 1", "seed", "true", "integer from 0 to 9223372036854775807")),
        ({"seed": "1e400"}, names("row 1", "seed", "1e400", "integer from 0 to 9223372036854775807")),
        ({"rand_device": "gpu"}, names("row 1", "rand_device", "gpu", "cpu or cuda")),
        ({"rand_device": None}, names("row 1", "rand_device", "is empty", "cpu or cuda")),
        ({"num_inference_steps": 0}, names("row 1", "num_inference_steps", 0, "integer from 1 to 1000")),
        ({"cfg_scale": "4"}, names("row 1", "cfg_scale", 4, "expected 1")),
        ({"cfg_scale": "x"}, names("row 1", "cfg_scale", "x", "expected 1")),
    ],
)
def test_rows_that_cannot(says, changes, message):
    with pytest.raises(FaultsFound) as raised:
        read_sampling(ROW | changes, "row 1")
    says(raised.value.problems)
    assert [problem.message for problem in raised.value.problems] == [message]


def test_all_that_is_wrong_with_a_row_is_told():
    with pytest.raises(FaultsFound) as raised:
        read_sampling({}, "row 1")
    assert len(raised.value.problems) == 4

"""What direct distillation reads of a row: numbers as csv and json hold them, everything else told."""

import pytest

from diffsynth_core.data.sampling import Sampling, read_sampling
from diffsynth_core.errors import FaultsFound

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
        ({"seed": ""}, "row 1: column `seed` is empty, expected an integer from 0 to 9223372036854775807"),
        ({"seed": None}, "row 1: column `seed` is empty, expected an integer from 0 to 9223372036854775807"),
        ({"seed": "-1"}, "row 1: column `seed` holds `-1`, expected an integer from 0 to 9223372036854775807"),
        ({"seed": 1.5}, "row 1: column `seed` holds `1.5`, expected an integer from 0 to 9223372036854775807"),
        ({"seed": True}, "row 1: column `seed` holds `true`, expected an integer from 0 to 9223372036854775807"),
        (
            {"seed": "1e400"},
            "row 1: column `seed` holds `1e400`, expected an integer from 0 to 9223372036854775807",
        ),
        ({"rand_device": "gpu"}, "row 1: column `rand_device` holds `gpu`, expected cpu or cuda"),
        ({"rand_device": None}, "row 1: column `rand_device` is empty, expected cpu or cuda"),
        (
            {"num_inference_steps": 0},
            "row 1: column `num_inference_steps` holds `0`, expected an integer from 1 to 1000",
        ),
        (
            {"cfg_scale": "4"},
            "row 1: column `cfg_scale` holds `4`, expected 1: distillation trains without guidance",
        ),
        (
            {"cfg_scale": "x"},
            "row 1: column `cfg_scale` holds `x`, expected 1: distillation trains without guidance",
        ),
    ],
)
def test_rows_that_cannot(changes, message):
    with pytest.raises(FaultsFound) as raised:
        read_sampling(ROW | changes, "row 1")
    assert [problem.message for problem in raised.value.problems] == [message]


def test_all_that_is_wrong_with_a_row_is_told():
    with pytest.raises(FaultsFound) as raised:
        read_sampling({}, "row 1")
    assert len(raised.value.problems) == 4

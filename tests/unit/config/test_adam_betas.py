"""`adam_betas`: two numbers in [0, 1), as a list or separated by a comma."""

import pytest

from diffsynth_core.config.parameters import Parameters, as_plain
from diffsynth_core.config.resolve import resolve
from tests.naming import names


@pytest.mark.parametrize("given", ["0.9,0.99", " 0.9 , 0.99", [0.9, 0.99], (0.9, 0.99), ["0.9", "0.99"]], ids=repr)
def test_two_numbers(given):
    parameters = Parameters.model_validate({"adam_betas": given})
    assert parameters.adam_betas == (0.9, 0.99) and as_plain(parameters)["adam_betas"] == [0.9, 0.99]


def test_whole_numbers():
    assert Parameters.model_validate({"adam_betas": "0,0"}).adam_betas == (0, 0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("0.9", "takes two comma-separated numbers"),
        ("0.9,0.99,0.999", "takes two comma-separated numbers"),
        ("0.9,", "takes two comma-separated numbers"),
        ("", "takes two comma-separated numbers"),
        (0.9, "takes two comma-separated numbers"),
        ("high,low", "takes two comma-separated numbers"),
        ("0.9,nan", "takes two comma-separated numbers"),
        ([True, 0.9], "takes two comma-separated numbers"),
        ({"a": 0.9, "b": 0.99}, "takes two comma-separated numbers"),
        ("0.9,1", "takes two comma-separated numbers of less than 1"),
        ("-0.1,0.9", "takes two comma-separated numbers of at least 0"),
    ],
    ids=repr,
)
def test_anything_else_is_one_problem(given, told):
    (problem,) = (one for one in resolve({"adam_betas": given}).problems if "adam_betas" in one.message)
    assert problem.message == names("adam_betas", told) and problem.wrong_use


@pytest.mark.parametrize("given", [1, 1.5, -0.1, "nan", "often"], ids=repr)
def test_a_caption_dropout_is_at_least_0_and_less_than_1(given):
    (problem,) = (one for one in resolve({"caption_dropout": given}).problems if "caption_dropout" in one.message)
    assert problem.message == names("caption_dropout", "takes a number")

"""A message is compared by what it names."""

import pytest

from tests.naming import in_any_order, names

MESSAGE = "`/d/metadata.csv` row 3: `a.png` is 15 x 64 pixels, expected at least 16"


@pytest.mark.parametrize(
    "parts", [("row 3",), ("/d/metadata.csv", "row 3", "a.png"), (15, 64, "at least 16"), ("a.png", "15 x 64")]
)
def test_what_is_named(parts):
    assert names(*parts) == MESSAGE
    assert f"error: none\nerror: {MESSAGE}\n" == names(*parts)
    assert ["other", (MESSAGE, None)][1:] == [(names(*parts), None)]


@pytest.mark.parametrize(
    "parts",
    [("row 2",), ("row", "b.png"), ("64", "15"), ("1",), (".png",), ("metadata.csv",), ("/d",), ("/d/metadata",)],
)
def test_what_is_not_named_or_only_a_part_of_a_name_or_in_another_order(parts):
    assert names(*parts) != MESSAGE


def test_what_is_named_stands_on_one_line():
    assert names("row 1", "a.png") != "row 1: fine\nrow 2: `a.png`"


def test_no_message_names_nothing():
    assert names("row 1") != None  # noqa: E711


def test_a_failure_lists_what_is_missing():
    expected = names("row 3", "b.png", 17)
    assert expected != MESSAGE and repr(expected) == "names('row 3', 'b.png', '17') without ['b.png', '17']"


def test_a_list_in_any_order():
    first, second = names("row 3"), names("row 4")
    assert in_any_order(first, second) == ["row 4", "row 3"]
    assert in_any_order(first, second) != ["row 4"]
    assert in_any_order(first, second) != ["row 4", "row 4"]
    assert in_any_order(first, second) != ["row 3", "row 4", "row 3"]

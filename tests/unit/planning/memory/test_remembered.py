"""Results that are remembered as long as the records live that they were computed for."""

from dataclasses import dataclass

import pytest

from diffsynth_core.planning.memory.remembered import remembered


@dataclass(frozen=True)
class Record:
    """A record that does not hash."""

    values: dict


def test_each_result_is_computed_once():
    calls = []

    @remembered
    def total(record, factor):
        calls.append((record, factor))
        return sum(record.values.values()) * factor

    one, equal = Record({"a": 1}), Record({"a": 1})
    assert [total(one, 2), total(one, 2), total(one, 3), total(equal, 2)] == [2, 2, 3, 2]
    assert len(calls) == 3  # an equal record is another one


def test_nothing_is_remembered_of_freed_records():
    """Another object may get the id of a freed one."""

    @remembered
    def name(record):
        return record.values["name"]

    for number in range(1000):
        assert name(Record({"name": number})) == number
    assert not name.__closure__ or all(
        not cell.cell_contents for cell in name.__closure__ if isinstance(cell.cell_contents, dict)
    )


def test_arguments_are_told_by_their_position():
    with pytest.raises(AssertionError):
        remembered(lambda record: record)(record=Record({}))

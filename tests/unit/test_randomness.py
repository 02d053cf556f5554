"""Keyed permutations and keys: bijective, different by key, identical on all machines, constant cost at any size."""

import time
from itertools import pairwise

import pytest

from diffsynth_core.randomness import key_of, permute


@pytest.mark.parametrize("size", [*range(1, 71), 127, 128, 129, 255, 256, 257, 1000, 4096, 4097, 20011])
def test_permute_is_a_bijection(size):
    assert sorted(permute(index, size, key_of("size", size)) for index in range(size)) == list(range(size))


@pytest.mark.parametrize("key", [0, 1, 2**63, 2**64 - 1])
def test_permute_is_a_bijection_for_the_keys_at_the_ends(key):
    assert sorted(permute(index, 100, key) for index in range(100)) == list(range(100))


def test_permute_is_the_same_every_time():
    assert [permute(index, 10, 42) for index in range(10)] == [2, 8, 1, 4, 0, 3, 6, 7, 5, 9]


def test_orders_differ_by_key():
    orders = {tuple(permute(index, 1000, key) for index in range(1000)) for key in range(50)}
    assert len(orders) == 50


def test_all_orders_of_a_small_set_occur():
    orders = {tuple(permute(index, 4, key_of("small", key)) for index in range(4)) for key in range(1000)}
    assert len(orders) == 24


@pytest.mark.parametrize("size", [2, 3, 7, 16, 30])
def test_every_index_goes_everywhere_about_equally_often(size):
    draws = 200 * size
    for index in (0, size - 1):
        places = [permute(index, size, key_of("even", key)) for key in range(draws)]
        counts = [places.count(place) for place in range(size)]
        assert min(counts) > 130 and max(counts) < 270, counts


def test_an_order_keeps_no_trace_of_the_order_before_it():
    places = [permute(index, 1000, key_of("trace")) for index in range(1000)]
    neighbors = sum(abs(one - other) == 1 for one, other in pairwise(places))
    fixed = sum(place == index for index, place in enumerate(places))
    assert neighbors < 12 and fixed < 8  # both are about 2 and 1 for a random order


@pytest.mark.timeout(20)
def test_a_huge_size_costs_no_more_than_a_small_one():
    def seconds(size: int) -> float:
        started = time.perf_counter()
        for index in range(3000):
            permute(index, size, 9)
        return time.perf_counter() - started

    seconds(10**6)
    assert seconds(10**18) < 20 * seconds(10**6) + 0.1


def test_a_huge_size_spreads_over_its_range():
    size = 10**18
    places = [permute(index, size, key_of("huge")) for index in range(2000)]
    assert len(set(places)) == 2000
    assert all(0 <= place < size for place in places)
    assert 0.45 < sum(places) / len(places) / size < 0.55


@pytest.mark.parametrize(("index", "size"), [(-1, 5), (5, 5), (0, 0), (10**18, 10**18)])
def test_an_index_outside_is_refused(index, size):
    with pytest.raises(IndexError, match=str(index)):
        permute(index, size, 1)


def test_keys_are_those_of_every_other_machine():
    assert key_of("order", 0, 1) == 1953072085611776627
    assert key_of("noise", 7, "a") == 17011452946576883720


def test_keys_have_64_bits():
    keys = [key_of(number) for number in range(2000)]
    assert max(keys) < 2**64 and max(keys) > 2**63
    assert {bit for bit in range(64) if any(key >> bit & 1 for key in keys)} == set(range(64))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1,), ("1",)),
        ((1, 2), (12,)),
        (("a", "b"), ("ab",)),
        ((1, 2), (2, 1)),
        ((0,), (0, 0)),
        ((-1,), (1,)),
        ((), (0,)),
    ],
)
def test_keys_tell_parts_and_types_apart(one, other):
    assert key_of(*one) != key_of(*other)

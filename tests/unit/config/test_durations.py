"""Durations: what is read, what is not, and what may have been meant."""

import pytest

from diffsynth_core.config.durations import duration_seconds, nearest_durations


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("20s", 20), ("90m", 5400), ("3h50m", 13800), ("3H 50M", 13800), ("1.5h", 5400), (" 1d12h ", 129600), ("0h5s", 5)],
)
def test_amounts_are_added_up(text, seconds):
    assert duration_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "20", "h", "50m3h", "3h3h", "-3h", "3 hours", "3:50:00", "nan", "1e9s"])
def test_what_is_no_duration_is_rejected(text):
    with pytest.raises(ValueError, match="is not a duration such as 3h50m"):
        duration_seconds(text)


@pytest.mark.parametrize(
    ("text", "near"),
    [("90", ["90s", "90m", "90h"]), ("3:50:00", ["3h50m"]), ("00:00:20", ["20s"]), ("0", []), ("soon", [])],
)
def test_what_may_have_been_meant(text, near):
    assert nearest_durations(text) == near
    assert all(duration_seconds(one) for one in near)

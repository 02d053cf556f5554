"""Durations as users write them: `3h50m`, `90m`, `20s`."""

import re

DURATION_WORDS = "a duration such as 3h50m, 90m or 20s"
"""What a duration parameter accepts, in messages."""
UNITS = {"d": 24 * 3600, "h": 3600, "m": 60, "s": 1}
"""Seconds per unit, in the order in which units are written."""
NUMBER = r"\d+(?:\.\d+)?"
AMOUNTS = re.compile("".join(rf"(?:(?P<{unit}>{NUMBER}) ?{unit} ?)?" for unit in UNITS))
"""Amounts of units that are each written once, the largest first."""


def duration_seconds(text: str) -> float:
    """Return the seconds of a duration such as `3h50m`, `1.5h` or `2d 12h`; more than 0.

    Raises:
        ValueError: if `text` is not one; a bare number has no unit.
    """
    found = AMOUNTS.fullmatch(text.strip().lower())
    seconds = sum(float(found[unit] or 0) * size for unit, size in UNITS.items()) if found else 0
    if not seconds:
        raise ValueError(f"is not {DURATION_WORDS}")
    return seconds


def nearest_durations(text: str) -> list[str]:
    """Return what `text` may mean: a number without a unit, or the `HH:MM:SS` of batch systems."""
    if re.fullmatch(NUMBER, text.strip()) and float(text):
        return [f"{text.strip()}{unit}" for unit in ("s", "m", "h")]
    if clock := re.fullmatch(r"(\d+):(\d\d):(\d\d)", text.strip()):
        amounts = zip(map(int, clock.groups()), ("h", "m", "s"), strict=True)
        return ["".join(f"{amount}{unit}" for amount, unit in amounts if amount)]
    return []

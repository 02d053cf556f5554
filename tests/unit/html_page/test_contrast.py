"""The colors of the pages, light and dark: https://www.w3.org/TR/WCAG22/, level AA."""

import re

import pytest

from diffsynth_core.html_page.document import base_style, read_part

TEXT, GRAPHICS = 4.5, 3.0
"""Least contrasts: of text of any size, and of what shows where a control, a bar or a curve is."""
GROUNDS = ("ground", "panel")
BASE = {
    **{(color, ground): TEXT for color in ("text", "soft", "error", "warning", "info", "good") for ground in GROUNDS},
    **{(color, "accent-soft"): TEXT for color in ("text", "soft", "error", "warning", "info")},
    **{("accent", ground): GRAPHICS for ground in (*GROUNDS, "accent-soft")},
    **{("edge", ground): GRAPHICS for ground in GROUNDS},
    ("bar", "panel"): GRAPHICS,
}
PAIRS = {
    "dataset_report/page/report.css": BASE,
    "run_page/page/run.css": BASE | {(f"c{number}", "panel"): GRAPHICS for number in range(2, 6)},
}
"""Style of a page -> (color, its background) -> minimum contrast: a selected filter has the background `accent-soft`,
bars and curves that of panels.
"""
DECORATION = {"line", "crop", "raw"}
"""Lines between rows; the frame of a crop, which has a dark outline for images of any color; the values of each step
behind their smooth curve.
"""


def schemes(style: str) -> dict[str, dict[str, str]]:
    """The variables of a page's style sheet by color scheme; the dark one leaves the rest as in the light one."""
    package, _, name = style.partition("/page/")
    text = base_style() + read_part(f"diffsynth_core.{package}", name)
    head = r"@media \(prefers-color-scheme: dark\) \{\n"
    dark = re.findall(head + r"  :root \{(.*?)\}", text, re.DOTALL)
    light = re.findall(r"^:root \{(.*?)\}", text, re.DOTALL | re.MULTILINE)
    found = [dict(re.findall(r"--([\w-]+): (#\w+);", "".join(blocks))) for blocks in (light, dark)]
    return {"light": found[0], "dark": found[0] | found[1]}


def luminance(color: str) -> float:
    """Relative luminance of `#rrggbb`, as WCAG defines it."""
    channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_contrast_of_black_and_white_is_21():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("style", PAIRS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_pair_has_the_contrast_of_level_aa(style, scheme):
    colors = schemes(style)[scheme]
    low = {pair: contrast(colors[pair[0]], colors[pair[1]]) for pair in PAIRS[style]}
    assert {pair: round(value, 2) for pair, value in low.items() if value < PAIRS[style][pair]} == {}


@pytest.mark.parametrize("style", PAIRS)
def test_every_color_is_held_against_what_it_stands_on(style):
    light, dark = schemes(style).values()
    assert light.keys() == dark.keys()
    assert light.keys() - DECORATION == {name for pair in PAIRS[style] for name in pair}
    assert {name for name in light if light[name] == dark[name]} <= {"crop"}

"""Charts of curves over steps as HTML with inline SVG, readable without scripts. No torch.

A chart stretches to the width of its figure: curves are drawn in a square of their own that is scaled without its
strokes, and texts stand at percentages of the width, in pixels of their own.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from diffsynth_core.run_page.series import Point

SIDE = 1000
"""Of the square in which curves are drawn."""
TOP, BOTTOM = 16, 22
"""Pixels above and below the square."""
VALUE_TICKS = 4
"""About how many horizontal lines a chart has."""
STEP_TICKS = 5
"""About how many steps are labeled."""
SPIKE_SHARE = 0.99
"""A chart is as high as this share of the raw values needs, if the others are far above."""
FAR_ABOVE = 1.6
"""Multiple of that height from which a value is a spike."""
SHOWN_DIGITS = 4


@dataclass(frozen=True)
class Curve:
    """A curve over steps.

    Attributes:
        kind: its class in the style: raw (the whole range of each point is drawn), line or dots.
        color: number of its color in the style, from 1.
    """

    label: str
    points: Sequence[Point]
    kind: str = "line"
    color: int = 1


@dataclass(frozen=True)
class Chart:
    """A figure of curves over the same steps.

    Attributes:
        note: unit and the like, after the title.
        last_step: the right end.
        height: in pixels.
        from_zero: whether the lower end is 0 if no value is below.
    """

    key: str
    title: str
    note: str
    curves: tuple[Curve, ...]
    last_step: int
    height: int = 180
    from_zero: bool = True


def chart_html(chart: Chart) -> str:
    """Return the figure; empty if no curve has a finite value."""
    curves = [curve for curve in chart.curves if any(math.isfinite(point.mean) for point in curve.points)]
    if not curves:
        return ""
    ticks, beyond = _scale(chart, curves)
    low, high = ticks[0], ticks[-1]
    last = max(1, chart.last_step)
    drawn = "".join(_curve_svg(curve, low, high, last) for curve in curves)
    key = "".join(_legend(curve) for curve in curves) if len(curves) > 1 else ""
    note = f"{chart.note}{'; ' if chart.note and beyond else ''}{beyond}"
    return (
        f'<figure class="panel chart" data-chart="{chart.key}"><figcaption><b>{escape(chart.title)}</b> '
        f"<span>{escape(note)}</span></figcaption>"
        f'<p class="legend">{key}<output class="readout"></output></p>'
        f'<div class="plot" tabindex="0" role="img" aria-label="{escape(_in_words(chart, curves))}">'
        f'<svg width="100%" height="{chart.height + TOP + BOTTOM}" aria-hidden="true">'
        f"{''.join(_lines(ticks, chart.height))}{''.join(_step_ticks(last, chart.height))}"
        f'<svg x="0" y="{TOP}" width="100%" height="{chart.height}" viewBox="0 0 {SIDE} {SIDE}" '
        f'preserveAspectRatio="none">{drawn}</svg>{"".join(_line_labels(ticks, chart.height))}'
        f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{TOP + chart.height}" visibility="hidden"/>'
        "</svg></div></figure>"
    )


def chart_data(chart: Chart) -> dict[str, Any]:
    """Return what the page's script reads out at a step: of each curve its label and [first, last, low, mean, high]."""
    curves = [
        {"label": curve.label, "points": [_point_data(point) for point in curve.points if math.isfinite(point.mean)]}
        for curve in chart.curves
    ]
    return {"last": max(1, chart.last_step), "curves": [curve for curve in curves if curve["points"]]}


def _point_data(point: Point) -> list[float]:
    return [
        point.first,
        point.last,
        *(float(f"{value:.{SHOWN_DIGITS}g}") for value in (point.low, point.mean, point.high)),
    ]


def _scale(chart: Chart, curves: Iterable[Curve]) -> tuple[list[float], str]:
    """Return the values of the horizontal lines, from the lowest to the highest, and how much is above them."""
    finite = [point for curve in curves for point in curve.points if math.isfinite(point.mean)]
    highs = sorted(point.high for point in finite)
    low, high = min(point.low for point in finite), highs[-1]
    usual = highs[min(len(highs) - 1, int(SPIKE_SHARE * len(highs)))]
    beyond = ""
    if usual > 0 and high > FAR_ABOVE * usual:
        spikes = [value for value in highs if value > usual * FAR_ABOVE]
        beyond = f"spikes up to {high:.{SHOWN_DIGITS}g} are beyond the chart" if spikes else ""
        high = usual * 1.1
    if chart.from_zero and low > 0:
        low = 0.0
    return nice_ticks(low, high, VALUE_TICKS), beyond


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers at equal distances that enclose a range."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    distance = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough * 0.999)
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return [float(f"{number * distance:.10g}") for number in range(first, max(last, first + 1) + 1)]


def _lines(ticks: Sequence[float], height: int) -> Iterator[str]:
    for y in _heights(ticks, height):
        yield f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'


def _line_labels(ticks: Sequence[float], height: int) -> Iterator[str]:
    for value, y in zip(ticks, _heights(ticks, height), strict=True):
        yield f'<text x="0" y="{y - 4:.1f}">{value:g}</text>'


def _heights(ticks: Sequence[float], height: int) -> list[float]:
    """Return the distance of each line from the upper end of the figure."""
    return [TOP + (ticks[-1] - value) / (ticks[-1] - ticks[0]) * height for value in ticks]


def _step_ticks(last: int, height: int) -> Iterator[str]:
    """Yield the labels of round steps but the first, which is where the labels of the lines are."""
    for step in nice_ticks(0, last, STEP_TICKS)[1:]:
        if step > last or step != int(step):
            continue
        share = 100 * step / last
        anchor = "end" if share > 94 else "middle"
        yield f'<text class="step" x="{share:.2f}%" y="{TOP + height + 16}" text-anchor="{anchor}">{step:,.0f}</text>'


def _curve_svg(curve: Curve, low: float, high: float, last: int) -> str:
    def x(point: Point) -> str:
        return f"{(point.first + point.last) / 2 / last * SIDE:.1f}"

    def y(value: float) -> str:
        return f"{min(max(1 - (value - low) / (high - low), -1), 2) * SIDE:.0f}"

    parts = []
    start = "M"
    for point in curve.points:
        if not math.isfinite(point.mean):
            start = "M"
            continue
        if curve.kind == "dots":
            parts.append(f"M{x(point)} {y(point.mean)}h0")
        elif curve.kind == "raw" and point.first != point.last:
            parts.append(f"{start}{x(point)} {y(point.low)}L{x(point)} {y(point.high)}")
        else:
            parts.append(f"{start}{x(point)} {y(point.mean)}")
        start = "L"
    path = "".join(parts)
    if curve.kind == "dots":  # with a line through them
        through = _curve_svg(Curve(curve.label, curve.points, "line", curve.color), low, high, last)
        return f'{through}<path class="curve dots c{curve.color}" d="{path}"/>'
    return f'<path class="curve {curve.kind} c{curve.color}" d="{path}"/>'


def _legend(curve: Curve) -> str:
    line = "line" if curve.kind == "dots" else curve.kind
    dot = f'<path class="curve dots c{curve.color}" d="M9 5h0"/>' if curve.kind == "dots" else ""
    return (
        f'<span><svg class="swatch" width="18" height="10" aria-hidden="true"><path class="curve {line} '
        f'c{curve.color}" d="M2 5H16"/>{dot}</svg>{escape(curve.label)}</span>'
    )


def _in_words(chart: Chart, curves: Iterable[Curve]) -> str:
    """Return what a chart shows, for those who do not see it."""
    texts = []
    for curve in curves:
        finite = [point for point in curve.points if math.isfinite(point.mean)]
        first, last = finite[0], finite[-1]
        low, high = min(point.low for point in finite), max(point.high for point in finite)
        values = [f"{value:.{SHOWN_DIGITS}g}" for value in (first.mean, last.mean, low, high)]
        texts.append(
            f"{curve.label}: {values[0]} at step {first.first}, {values[1]} at step {last.last}, "
            f"between {values[2]} and {values[3]}"
        )
    return f"{chart.title}. {'; '.join(texts)}"

"""Figures of the report page about the whole dataset, as HTML without scripts: histograms and buckets. No torch."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import inf, log

from diffsynth_core.dataset_report.dataset_facts import DatasetFacts
from diffsynth_core.dataset_report.set_checks import Size, header_of, shapes_of
from diffsynth_core.progress import pluralize

MEGAPIXELS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
"""Edges of the histogram of sizes."""
CHARACTERS = (1, 10, 20, 30, 50, 75, 100, 150, 200, 300, 400, 600, 800, 1200, 1600, 2400, 3200)
"""Edges of the histogram of caption lengths."""
RATIOS = {
    f"{width}:{height}": width / height
    for width, height in (
        *((1, 4), (1, 3), (1, 2), (9, 16), (2, 3), (3, 4), (4, 5), (1, 1)),
        *((5, 4), (4, 3), (3, 2), (16, 9), (2, 1), (3, 1), (4, 1)),
    )
}
"""Aspect ratios; an image is counted at the nearest one."""
SHOWN_BUCKETS = 200
"""Maximum number of buckets in the table."""

WIDTH, HEIGHT = 360, 170
"""Of a histogram, in units of its own that are about a pixel each."""
LEFT, RIGHT, TOP, BOTTOM = 8, 8, 18, 24
MOST_TICKS = 10
"""Maximum number of labels below a histogram."""
LEAST_BARS = 6
"""Minimum number of bars by which the width is divided."""
LEAST_TALL = 2
"""Minimum height of a bar that is not 0."""


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram: what it counts, and the label below it."""

    meaning: str
    tick: str
    count: int


@dataclass(frozen=True)
class Histogram:
    """Bars from left to right.

    Attributes:
        end: label below the end of the last bar, if labels are at the edges of bars; None: below their centers.
    """

    title: str
    note: str
    bars: tuple[Bar, ...]
    end: str | None


def histograms(dataset: DatasetFacts) -> tuple[Histogram, ...]:
    """Return size and aspect ratio of targets, and caption lengths, without empty histograms."""
    targets = {name for record in dataset.rows.records for name in record.files.get(dataset.rows.columns.target, ())}
    headers = [header for header in (header_of(dataset, name) for name in targets) if header]
    megapixels = [header.width * header.height / 1e6 for header in headers]
    lengths = [len(record.caption) for record in dataset.rows.records if record.caption is not None]
    every = (
        _between("Size", "megapixels", megapixels, MEGAPIXELS),
        Histogram("Aspect", "width to height", _nearest(header.width / header.height for header in headers), None),
        _between("Caption length", "characters", lengths, CHARACTERS),
    )
    return tuple(one for one in every if one.bars)


def _between(title: str, unit: str, values: Sequence[float], edges: Sequence[float]) -> Histogram:
    """Return bars below the first edge, from each edge to the next, and above the last."""
    counted = Counter(bisect_right(edges, value) for value in values)
    bounds = [0, *edges, inf]
    bars = []
    for place in _stretch(counted):
        low, high = bounds[place : place + 2]
        meaning = f"{low:g} {unit} or more" if high == inf else f"{low:g} to less than {high:g} {unit}"
        bars.append(Bar(meaning, f"{low:g}", counted[place]))
    last = bounds[max(counted) + 1] if counted else inf
    return Histogram(title, unit, tuple(bars), "" if last == inf else f"{last:g}")


def _nearest(values: Iterable[float]) -> tuple[Bar, ...]:
    """Return bars of the ratios nearest to the values, by relative distance."""
    names = list(RATIOS)
    counted: Counter[int] = Counter()
    for value, count in Counter(values).items():
        counted[min(range(len(names)), key=lambda place: abs(log(value / RATIOS[names[place]])))] += count
    return tuple(Bar(f"about {names[place]}", names[place], counted[place]) for place in _stretch(counted))


def _stretch(counted: Counter[int]) -> range:
    """Return the range of indices with a count."""
    return range(min(counted), max(counted) + 1) if counted else range(0)


def histogram_html(histogram: Histogram) -> str:
    """Return a figure with an inline SVG, whose numbers are accessible to screen readers."""
    label = "; ".join(f"{bar.meaning}: {bar.count}" for bar in histogram.bars if bar.count)
    most = max(bar.count for bar in histogram.bars)
    step = (WIDTH - LEFT - RIGHT) / max(len(histogram.bars), LEAST_BARS)
    floor = HEIGHT - BOTTOM
    drawn = [_bar_svg(bar, LEFT + place * step, step, most, floor) for place, bar in enumerate(histogram.bars)]
    return (
        f'<figure class="panel histogram"><figcaption><b>{escape(histogram.title)}</b> <span>{escape(histogram.note)}</span>'
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor + 0.5}" y2="{floor + 0.5}"/>{"".join(drawn)}'
        f"{''.join(_ticks_svg(histogram, step))}</svg></figure>"
    )


def _bar_svg(bar: Bar, x: float, step: float, most: int, floor: int) -> str:
    """Return one bar with its number above it; its meaning is a tooltip of the whole column."""
    tall = max(bar.count / most * (floor - TOP), LEAST_TALL) if bar.count else 0
    value = f'<text class="value" x="{x + step / 2:.1f}" y="{floor - tall - 5:.1f}">{bar.count}</text>'
    return (
        f"<g><title>{escape(bar.meaning)}: {bar.count}</title>"
        f'<rect class="hit" x="{x:.1f}" y="0" width="{step:.1f}" height="{floor}"/>'
        f'<rect class="bar" x="{x + 1.5:.1f}" y="{floor - tall:.1f}" width="{step - 3:.1f}" height="{tall:.1f}" rx="2"/>'
        f"{value if bar.count else ''}</g>"
    )


def _ticks_svg(histogram: Histogram, step: float) -> Iterator[str]:
    """Yield as many labels below the bars as fit."""
    texts = [bar.tick for bar in histogram.bars]
    texts += [histogram.end] if histogram.end else []
    shift = step / 2 if histogram.end is None else 0
    every = -(-len(texts) // MOST_TICKS)
    for place in range(0, len(texts), every):
        yield f'<text x="{LEFT + place * step + shift:.1f}" y="{HEIGHT - 7}">{escape(texts[place])}</text>'


@dataclass(frozen=True)
class BucketLine:
    """The samples of one bucket.

    Attributes:
        shape: training size of the target.
        shown: sizes of the conditions.
        batches: batches per epoch, of which the last has `last` samples.
    """

    shape: Size
    shown: tuple[Size, ...]
    samples: int
    batches: int
    last: int


def bucket_lines(dataset: DatasetFacts) -> list[BucketLine]:
    """Return buckets, most frequent first."""
    rules = dataset.rules
    lines = []
    counted = Counter(tuple(sizes.items()) for sizes in shapes_of(dataset).values())
    for ((_, (shape,)), *others), samples in counted.most_common():
        shown = tuple(size for _, sizes in others for size in sizes)
        batches = -(-samples * rules.repeat // rules.batch_size)
        last = samples * rules.repeat - (batches - 1) * rules.batch_size
        lines.append(BucketLine(shape, shown, samples, batches, last))
    return lines


def buckets_html(dataset: DatasetFacts) -> str:
    """Return the table of buckets, with small ones marked; empty if no size is known."""
    lines = bucket_lines(dataset)
    if not lines:
        return ""
    rules = dataset.rules
    short = sum(line.last < rules.batch_size for line in lines)
    what = f"{pluralize(len(lines), 'bucket')}, {pluralize(sum(line.batches for line in lines), 'batch', 'batches')} "
    what += f"per epoch at batch size {rules.batch_size}"
    what += f", the data repeated {rules.repeat} times" if rules.repeat > 1 else ""
    what += f"; the last batch of {short} of them is short" if short else "; no batch is short"
    rows = "".join(_bucket_row(line, lines[0].samples, rules.batch_size) for line in lines[:SHOWN_BUCKETS])
    if len(lines) > SHOWN_BUCKETS:
        rest = sum(line.samples for line in lines[SHOWN_BUCKETS:])
        rows += f'<tr><th scope="row">{len(lines) - SHOWN_BUCKETS} more</th><td class="n">{rest}</td></tr>'
    return (
        f'<p>{what}</p><div class="scroll" tabindex="0" role="region" aria-label="Buckets"><table><thead><tr>'
        '<th scope="col">Width &times; height</th><th scope="col" class="n">Samples</th><td></td>'
        '<th scope="col" class="n">Batches</th><th scope="col">Last batch</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _bucket_row(line: BucketLine, most: int, batch_size: int) -> str:
    size = _size(line.shape)
    if line.shown:
        size += f" <small>reference {', '.join(map(_size, line.shown))}</small>"
    bar = f'<svg class="share" aria-hidden="true"><rect width="{100 * line.samples / most:.1f}%" height="100%"/></svg>'
    full = line.last == batch_size
    last = "full" if full else f'<span class="short">short</span> {line.last} of {batch_size}'
    kind = "" if full else ' class="is-short"'
    return (
        f'<tr{kind}><th scope="row">{size}</th><td class="n">{line.samples}</td><td class="wide">{bar}</td>'
        f'<td class="n">{line.batches}</td><td>{last}</td></tr>'
    )


def _size(shape: Size) -> str:
    """As HTML."""
    frames, height, width = shape
    return f"{width} &times; {height}" + (f" &times; {frames} frames" if frames > 1 else "")

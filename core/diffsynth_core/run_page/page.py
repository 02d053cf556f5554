"""The page of a run as one self-contained HTML file: no other files, no network. No torch.

Numbers, curves and the latest previews are HTML, readable without scripts; earlier previews and what charts read out
are JSON for the page's script. Template, style and script are in the folder `page`.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from diffsynth_core.checkpoints.run_folder import PREVIEWS, PreviewImage, preview_folder
from diffsynth_core.config.documents import format_value
from diffsynth_core.config.parameters import GROUPS, SETTINGS
from diffsynth_core.errors import DiffSynthError, truncate
from diffsynth_core.html_page.document import (
    base_style,
    content_policy,
    generator_mark,
    has_mark,
    json_for_script,
    read_part,
    write_page_text,
)
from diffsynth_core.progress import format_bytes, format_duration
from diffsynth_core.run_page.charts import Chart, Curve, chart_data, chart_html
from diffsynth_core.run_page.commands import as_default, next_commands
from diffsynth_core.run_page.facts import RunFacts, ValidationLoss
from diffsynth_core.run_page.previews import PromptImages
from diffsynth_core.run_page.series import Point, downsample
from diffsynth_core.run_page.text import (
    format_number,
    local_time,
    lowest_validation,
    memory_in_words,
    reason_of,
    steps_in_words,
)
from diffsynth_core.run_page.thumbnails import FAILED, Thumbnails

MARK = generator_mark("train")
"""Marker in the head of every page."""
REFRESH_SECONDS = 10
"""How often a browser loads the page of a run that goes on."""
STALE_SECONDS = 300
"""A page that was not written for so long may be out of date: steps, validations and previews rarely take longer."""
STALE_STEPS = 20
"""The same, in steps, where these are slow."""
LEVELS = {"running": "info", "completed": "good", "interrupted": "warning", "failed": "error", "killed": "error"}
"""Status of a run -> its color."""
MAX_TEXT = 600
"""Maximum number of characters of a prompt or a parameter on the page."""
MAX_CHECKPOINTS = 200
"""Maximum number of checkpoints on the page: the latest."""
BAND_LABELS = ("noisiest", "noisy", "clean", "cleanest")
"""Quarters of the timesteps."""
LARGE_HEIGHT = 260
"""Of the chart of the loss, in pixels."""


def check_is_ours(path: Path) -> None:
    """Check that no other file would be overwritten.

    Raises:
        DiffSynthError: if there is one.
    """
    if os.path.lexists(path) and not has_mark(path, MARK):
        raise DiffSynthError(f"`{path}` is not the page of a run, and is not overwritten")


def write_page(path: Path, facts: RunFacts, thumbnails: Thumbnails, now: float) -> None:
    """Write the page atomically.

    Args:
        now: seconds since 1970.

    Raises:
        DiffSynthError: if the disk refuses.
    """
    write_page_text(path, page_html(facts, thumbnails, now))


def page_html(facts: RunFacts, thumbnails: Thumbnails, now: float) -> str:
    """Return the page; `thumbnails` remembers those of earlier pages."""
    prompts, made = thumbnails.make(facts.previews)
    style, script = base_style() + _part("run.css"), _part("run.js")
    loss, *others = (chart for chart in charts(facts))
    running = facts.status == "running"
    record = facts.record
    data = {
        "key": record.id or str(facts.folder),
        "written": round(now, 3),
        "refresh": REFRESH_SECONDS if running else None,
        "stale": max(STALE_SECONDS, STALE_STEPS * facts.step_seconds if math.isfinite(facts.step_seconds) else 0),
        "charts": {chart.key: chart_data(chart) for chart in (loss, *others)},
        "steps": sorted({step for prompt in prompts for step in prompt.images}),
        "previews": [_preview_data(prompt, made) for prompt in prompts],
    }
    return Template(_part("run.html")).substitute(
        mark=MARK,
        policy=content_policy(style, script),
        refresh=f'<noscript><meta http-equiv="refresh" content="{REFRESH_SECONDS}"></noscript>' if running else "",
        style=style,
        script=script,
        data=json_for_script(data),
        title=_text(facts.folder.name),
        status=facts.status,
        origin=_origin(facts),
        verdict=f"{facts.status.capitalize()}: {steps_in_words(facts)}",
        reason=f'<p class="reason error">{_text(reason_of(facts))}</p>' if reason_of(facts) else "",
        level=LEVELS[facts.status],
        total=max(1, record.total_steps),
        step=facts.step,
        written=local_time(now),
        seconds=REFRESH_SECONDS,
        numbers=_numbers(facts),
        charts=chart_html(loss),
        small_charts="".join(map(chart_html, others)),
        time=_time(facts),
        previews=_previews(facts, prompts, made),
        commands=_commands(facts),
        checkpoints=_checkpoints(facts),
        facts=_facts(facts),
        parameters=_parameters(facts),
        held=_held(facts, prompts, made),
    )


def _part(name: str) -> str:
    return read_part("diffsynth_core.run_page", name)


def _text(text: str) -> str:
    """Return a text of the run as HTML, of bounded length."""
    return escape(truncate(text, MAX_TEXT))


def _origin(facts: RunFacts) -> str:
    recipe = facts.record.parameters.get("recipe")
    of_recipe = f", recipe <b>{_text(str(recipe))}</b>" if recipe else ""
    return f"<code>{_text(str(facts.folder))}</code>, {_text(facts.record.family)}{of_recipe}"


def charts(facts: RunFacts) -> Iterator[Chart]:
    """Yield the chart of the loss, and the smaller ones."""
    series, last = facts.series, facts.step
    validations = _validation_points(facts.validations, [one.loss for one in facts.validations])
    yield Chart(
        "loss",
        "Loss",
        f"of each step, and as the moving average of about {facts.smoothing_steps} steps",
        (
            Curve("each step", downsample(series.steps, series["loss"]), "raw"),
            Curve("average", downsample(series.steps, facts.smoothed_loss)),
            Curve("validation", validations, "dots", 2),
        ),
        last,
        LARGE_HEIGHT,
    )
    yield Chart("bands", "Validation loss", "by band of timesteps", tuple(_bands(facts.validations)), last)
    yield _single("lr", "Learning rate", "", facts, "lr")
    yield _single("norm", "Gradient norm", "before clipping", facts, "grad_norm")
    yield Chart(
        "seconds",
        "Step time",
        "seconds",
        (
            Curve("step", downsample(series.steps, series["seconds"])),
            Curve("waiting for data", downsample(series.steps, series["data_seconds"]), "line", 2),
        ),
        last,
    )


def _single(key: str, title: str, note: str, facts: RunFacts, field: str) -> Chart:
    points = downsample(facts.series.steps, facts.series[field])
    return Chart(key, title, note, (Curve(title.lower(), points),), facts.step)


def _bands(validations: Sequence[ValidationLoss]) -> Iterator[Curve]:
    count = max((len(one.bands) for one in validations), default=0)
    for number in range(count if count > 1 else 0):
        values = [one.bands[number] if number < len(one.bands) else math.nan for one in validations]
        label = BAND_LABELS[number] if count == len(BAND_LABELS) else f"band {number + 1}"
        yield Curve(label, _validation_points(validations, values), "line", number % 5 + 1)


def _validation_points(validations: Sequence[ValidationLoss], values: Sequence[float]) -> list[Point]:
    return downsample([one.step for one in validations], values)


def _numbers(facts: RunFacts) -> str:
    record = facts.record
    numbers = {}
    if len(facts.series):
        numbers["loss, averaged"] = format_number(facts.smoothed_loss[-1])
    if facts.validations:
        numbers["validation loss"] = format_number(facts.validations[-1].loss)
    lowest = lowest_validation(facts.validations)
    if lowest and lowest.step != facts.validations[-1].step:
        numbers[f"lowest, after step {lowest.step:,}"] = format_number(lowest.loss)
    if math.isfinite(facts.step_seconds):
        numbers["a step"] = f"{facts.step_seconds:.3g} s"
    if math.isfinite(facts.seconds_left):
        numbers["of steps left"] = format_duration(facts.seconds_left)
    if record.seconds:
        numbers["taken so far" if facts.status == "running" else "taken"] = format_duration(record.seconds)
    return "".join(f'<div class="number"><dt>{name}</dt><dd>{value}</dd></div>' for name, value in numbers.items())


def _time(facts: RunFacts) -> str:
    """Return where the time of the run went, up to its latest state."""
    until = facts.record.step if facts.status == "running" else facts.step
    steps, data = (facts.series.sum_until(field, until) for field in ("seconds", "data_seconds"))
    if not steps:
        return ""
    parts = {
        "computing": steps - data,
        "waiting for data": data,
        "loading, encoding, validating, drawing, saving": max(0.0, facts.record.seconds - steps),
    }
    whole = sum(parts.values())
    left, bars, texts = 0.0, [], []
    for number, (name, seconds) in enumerate(parts.items(), 1):
        share = seconds / whole
        bars.append(f'<rect class="s{number}" x="{left:.2f}%" width="{100 * share:.2f}%" height="100%"/>')
        texts.append(f'<li class="s{number}"><i></i>{name} {share:.0%}, {format_duration(seconds)}</li>')
        left += 100 * share
    return (
        '<section class="panel"><h2>Where the time went</h2>'
        f'<svg class="shares" aria-hidden="true">{"".join(bars)}</svg><ul class="parts">{"".join(texts)}</ul></section>'
    )


def _preview_data(prompt: PromptImages, made: Mapping[tuple[int, str], str]) -> list[list[Any]]:
    """Return of each image its step, thumbnail and address; the thumbnail of the last is in the page itself."""
    last = max(prompt.images)
    return [
        [step, None if step == last else made.get((step, image.file), FAILED), _address(step, image)]
        for step, image in prompt.images.items()
    ]


def _address(step: int, image: PreviewImage) -> str:
    """Return where the whole image is, relative to the page."""
    return f"{preview_folder(Path(), step).as_posix()}/{quote(image.file, errors='surrogateescape')}"


def _previews(facts: RunFacts, prompts: Sequence[PromptImages], made: Mapping[tuple[int, str], str]) -> str:
    if not prompts:
        return ""
    steps = sorted({step for prompt in prompts for step in prompt.images})
    of_all = ""
    if len(prompts) > 1 and len(steps) > 1:
        of_all = (
            f'<p class="all"><label for="all-steps">All prompts after step <output id="all-step">{steps[-1]:,}</output>'
            f'</label><input type="range" id="all-steps" min="0" max="{len(steps) - 1}" value="{len(steps) - 1}"></p>'
        )
    cards = "".join(_card(number, prompt, made) for number, prompt in enumerate(prompts))
    return f'<section class="panel previews"><h2>Previews</h2>{of_all}<ul>{cards}</ul></section>'


def _card(number: int, prompt: PromptImages, made: Mapping[tuple[int, str], str]) -> str:
    step, count = max(prompt.images), len(prompt.images)
    image = prompt.images[step]
    data = made.get((step, image.file), FAILED)
    source = f' src="{data}"' if data else " hidden"
    words = _text(prompt.prompt)
    clip = f", {image.num_frames} frames" if image.num_frames > 1 else ""
    return (
        f'<li data-prompt="{number}"><a href="{escape(_address(step, image))}">'
        f'<img{source} alt="{words}, step {step}" width="{image.width}" height="{image.height}">'
        f'<span class="nothing"{" hidden" if data else ""}>no thumbnail</span></a>'
        f'<p class="at"><span>step <output>{step:,}</output></span><input type="range" min="0" max="{count - 1}" '
        f'value="{count - 1}"{" disabled" if count == 1 else ""} aria-label="Step: {words}"></p>'
        f'<p class="prompt" dir="auto">{words}</p>'
        f'<p class="soft">seed {prompt.seed}, {image.width} &times; {image.height}{clip}</p></li>'
    )


def _commands(facts: RunFacts) -> str:
    parts = [
        f"<h3>{escape(one.purpose)}</h3><pre><code>{escape(one.line)}</code></pre>" for one in next_commands(facts)
    ]
    note = '<p class="soft">Relative paths are those of the folder where the run was started.</p>'
    return "".join(parts) + note if parts else '<p class="soft">Nothing yet: there is no checkpoint.</p>'


def _checkpoints(facts: RunFacts) -> str:
    entries = facts.record.checkpoints
    if not entries:
        return ""
    measured = any(entry.validation_loss is not None for entry in entries)
    rows = []
    for entry in reversed(entries[-MAX_CHECKPOINTS:]):
        best = '<span class="best">lowest</span> ' if entry == facts.best else ""
        loss = "" if entry.validation_loss is None else format_number(entry.validation_loss)
        rows.append(
            f'<tr><th scope="row"><a href="{quote(entry.file, errors="surrogateescape")}">{_text(entry.file)}</a></th>'
            f'<td class="n">{entry.step:,}</td><td class="n">{format_bytes(entry.bytes)}</td>'
            + (f'<td class="n">{best}{loss}</td>' if measured else "")
            + "</tr>"
        )
    head = '<th scope="col">File</th><th scope="col" class="n">Step</th><th scope="col" class="n">Size</th>'
    head += '<th scope="col" class="n">Validation loss</th>' if measured else ""
    return (
        '<section class="panel"><h2>Checkpoints</h2><div class="scroll" tabindex="0" role="region" '
        f'aria-label="Checkpoints"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div></section>'
    )


def _facts(facts: RunFacts) -> str:
    record = facts.record
    rows = {
        "dataset": _code(record.parameters.get("dataset_base_path")),
        "its fingerprint": _code(record.dataset_fingerprint[:12]),
        "samples seen": f"{record.samples_seen:,}",
        "precision": _text(record.mixed_precision),
        **({"GPU memory": memory_in_words(record.memory)} if record.memory else {}),
        "seed": str(record.seed),
        "started": _text(record.started),
        **{
            f"files of {_text(name)}": "<br>".join(
                f"{_code(file)} {_code(digest[:12])}" for file, digest in sorted(files.items())
            )
            for name, files in record.components.items()
        },
        "versions": _text(", ".join(f"{name} {version}" for name, version in record.versions.items())),
    }
    return f'<section class="panel facts"><h2>Dataset and model</h2>{_table(rows)}</section>'


def _code(value: object) -> str:
    return f"<code>{_text(str(value))}</code>" if value else "unknown"


def _table(rows: Mapping[str, str]) -> str:
    body = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in rows.items())
    return f"<table><tbody>{body}</tbody></table>"


def _parameters(facts: RunFacts) -> str:
    """Return those that are not at their default, and all of them, folded."""
    record = facts.record
    changed = [
        name
        for name, value in record.parameters.items()
        if value is not None and (name not in SETTINGS or value != as_default(name, record.family))
    ]
    return (
        '<section class="panel parameters"><h2>Parameters</h2>'
        f"{_table(_values(record.parameters, changed))}<details><summary>All parameters</summary>"
        f"{''.join(_by_group(record.parameters))}</details></section>"
    )


def _by_group(parameters: Mapping[str, Any]) -> Iterator[str]:
    for group, title in GROUPS.items():
        names = [name for name in parameters if name in SETTINGS and SETTINGS[name].group == group]
        if names:
            yield f"<h3>{escape(title)}</h3>{_table(_values(parameters, names))}"


def _values(parameters: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    return {_text(name): _value(parameters[name]) for name in names}


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value is None else _code(format_value(value))


def _held(facts: RunFacts, prompts: Sequence[PromptImages], made: Mapping[tuple[int, str], str]) -> str:
    """Return what of the run the page shows, and how much of it."""
    text = f"{len(facts.series):,} steps"
    drawn = sum(len(preview.images) for preview in facts.previews)
    if drawn:
        shown = sum(len(prompt.images) for prompt in prompts)
        text += f"; {'all' if shown == drawn else f'{shown:,} of'} {drawn:,} previews as thumbnails"
    return f"{text}. The whole images are in the folder <code>{PREVIEWS}</code>." if drawn else f"{text}."

"""A run as text for a terminal. No torch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from diffsynth_core.checkpoints.run_folder import MemoryUse
from diffsynth_core.progress import format_bytes, format_duration, format_memory, pluralize
from diffsynth_core.run_page.commands import next_commands
from diffsynth_core.run_page.facts import RunFacts, ValidationLoss
from diffsynth_core.run_page.previews import by_prompt
from diffsynth_core.run_page.series import downsample

BLOCKS = "▁▂▃▄▅▆▇█"
"""Heights of a sparkline."""
SPARKLINE_POINTS = 40
"""Maximum number of characters of a sparkline."""
SHOWN_CHECKPOINTS = 8
"""Maximum number of checkpoints that are listed: the latest."""
LABEL_COLUMNS = 12


def as_text(facts: RunFacts) -> list[str]:
    """Return lines, each a fact after its label; texts of the run in them are not escaped."""
    return [
        *_labeled("Run", [f"{facts.folder}"]),
        *_labeled("Status", [status_in_words(facts)]),
        *_labeled("Steps", [steps_in_words(facts)]),
        *_labeled("Loss", _loss(facts)),
        *_labeled("Validation", _validation(facts)),
        *_labeled("Step", _step(facts)),
        *_labeled("Memory", _memory(facts)),
        *_labeled("Previews", _previews(facts)),
        *_labeled("Checkpoints", _checkpoints(facts)),
        *(line for command in next_commands(facts) for line in ("", f"{command.purpose}:", _indented(command.line))),
    ]


@dataclass(frozen=True)
class Shown:
    """What of a run was printed already."""

    step: int
    validations: int
    preview_step: int
    checkpoints: frozenset[str]


def shown_of(facts: RunFacts) -> Shown:
    """Return what is printed once these facts are."""
    checkpoints = frozenset(entry.file for entry in facts.record.checkpoints)
    preview_step = facts.previews[-1].step if facts.previews else -1
    return Shown(facts.step, len(facts.validations), preview_step, checkpoints)


def news_lines(facts: RunFacts, before: Shown) -> Iterator[str]:
    """Yield what was measured, drawn and saved since."""
    for validation in facts.validations[before.validations :]:
        yield f"validation loss {validation_in_words(validation)}"
    for preview in facts.previews:
        if preview.step > before.preview_step:
            yield f"{pluralize(len(preview.images), 'preview')} in {preview.folder}"
    for entry in facts.record.checkpoints:
        if entry.file not in before.checkpoints:
            yield f"saved {entry.file} ({format_bytes(entry.bytes)})"


def progress_line(facts: RunFacts) -> str:
    """Return steps, loss and speed in one line."""
    loss = facts.smoothed_loss[-1] if len(facts.series) else math.nan
    speed = f", {facts.step_seconds:.3g} s a step" if math.isfinite(facts.step_seconds) else ""
    return f"step {steps_in_words(facts)}; loss {format_number(loss)}{speed}"


def _labeled(label: str, texts: Sequence[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        yield f"{label if number == 0 else '':<{LABEL_COLUMNS}}{text}"


def status_in_words(facts: RunFacts) -> str:
    """Return how a run goes on or has ended."""
    return ": ".join(filter(None, (facts.status, reason_of(facts))))


def reason_of(facts: RunFacts) -> str:
    """Return why a run ended before its last step; empty if it did not, or was asked to."""
    if facts.status == "killed":
        return (
            f"it was running at {local_time(facts.written)}, and no process of this machine holds the folder any more"
        )
    return facts.record.failure or "" if facts.status == "failed" else ""


def steps_in_words(facts: RunFacts) -> str:
    """Return the progress of a run, and how long the steps take that are left."""
    total = facts.record.total_steps
    text = f"{facts.step:,} of {total:,}" + (f" ({facts.step / total:.0%})" if total else "")
    return text + (
        f", about {format_duration(facts.seconds_left)} of steps left" if math.isfinite(facts.seconds_left) else ""
    )


def local_time(seconds: float) -> str:
    """Return a time since 1970 in the time zone of this machine."""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def format_number(value: float) -> str:
    """Format a number with four significant digits; `not finite` if it is not."""
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def _loss(facts: RunFacts) -> list[str]:
    series = facts.series
    if not len(series):
        return []
    smoothed = facts.smoothed_loss
    curve = [point.mean for point in downsample(series.steps, smoothed, SPARKLINE_POINTS)]
    average = f"{format_number(smoothed[-1])} as the moving average of about {facts.smoothing_steps} steps"
    return [f"{average}, {format_number(series.last('loss'))} in the last one", sparkline(curve)]


def _validation(facts: RunFacts) -> list[str]:
    if not facts.validations:
        return []
    latest, lowest = facts.validations[-1], lowest_validation(facts.validations)
    lines = [validation_in_words(latest)]
    if lowest and lowest.step != latest.step:
        lines[0] += f"; the lowest is {format_number(lowest.loss)} after step {lowest.step:,}"
    if len(latest.bands) > 1:
        lines.append(f"from the noisiest timesteps to the cleanest: {', '.join(map(format_number, latest.bands))}")
    losses = [one.loss for one in facts.validations[-SPARKLINE_POINTS:]]
    return [*lines, *([sparkline(losses)] if len(losses) > 1 else [])]


def validation_in_words(validation: ValidationLoss) -> str:
    """Return a loss on held-out samples and its step."""
    return f"{format_number(validation.loss)} after step {validation.step:,}"


def lowest_validation(validations: Sequence[ValidationLoss]) -> ValidationLoss | None:
    """Return the lowest finite loss on held-out samples, the first of equal ones."""
    finite = [one for one in validations if math.isfinite(one.loss)]
    return min(finite, key=lambda one: one.loss, default=None)


def _step(facts: RunFacts) -> list[str]:
    series = facts.series
    if not len(series):
        return []
    numbers = (
        f"learning rate {format_number(series.last('lr'))}, gradient norm {format_number(series.last('grad_norm'))}"
    )
    seconds = facts.step_seconds
    if not math.isfinite(seconds):
        return [numbers]
    return [f"{seconds:.3g} s, {waiting_share(facts):.0%} of it waiting for data; {numbers}"]


def waiting_share(facts: RunFacts) -> float:
    """Return the share of all steps that was spent waiting for data."""
    last = facts.series.steps[-1]
    seconds = facts.series.sum_until("seconds", last)
    return facts.series.sum_until("data_seconds", last) / seconds if seconds else 0.0


def _memory(facts: RunFacts) -> list[str]:
    return [memory_in_words(facts.record.memory)] if facts.record.memory else []


def memory_in_words(memory: MemoryUse) -> str:
    """Return the measured memory of a run against its estimate."""
    return f"{format_memory(memory.peak)} at most, estimated as {format_memory(memory.estimated)}"


def _previews(facts: RunFacts) -> list[str]:
    if not facts.previews:
        return []
    prompts, latest = by_prompt(facts.previews), facts.previews[-1]
    steps = pluralize(len(facts.previews), "step")
    return [f"{pluralize(len(prompts), 'prompt')}, drawn at {steps}; the latest in {latest.folder}"]


def _checkpoints(facts: RunFacts) -> list[str]:
    entries = facts.record.checkpoints
    shown = entries[-SHOWN_CHECKPOINTS:]
    width = max((len(entry.file) for entry in shown), default=0)
    lines = [f"{len(entries) - len(shown)} earlier ones"] if len(shown) < len(entries) else []
    for entry in shown:
        line = f"{entry.file:<{width}}  step {entry.step:,}  {format_bytes(entry.bytes)}"
        if entry.validation_loss is not None:
            line += f"  validation loss {format_number(entry.validation_loss)}"
        lines.append(line + ("  (the lowest)" if entry == facts.best else ""))
    return lines


def _indented(command: str) -> str:
    return "  " + command.replace("\n", "\n  ")


def sparkline(values: Sequence[float]) -> str:
    """Return a character for each value, the lowest as the lowest block; a space where it is not finite."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    top = len(BLOCKS) - 1
    return "".join(
        (BLOCKS[round((value - low) / span * top)] if span else BLOCKS[0]) if math.isfinite(value) else " "
        for value in values
    )

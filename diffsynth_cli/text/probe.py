"""What a probe measured, as text."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from diffsynth_cli.text.plan import format_size
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import format_duration, format_memory, pluralize, verb

if TYPE_CHECKING:
    from diffsynth_core.training.probe import Probed


def probe_lines(plan: RunPlan, probed: "Probed") -> Iterator[str]:
    """Speed of steps and encoders, time and cost of the whole run, and memory, one line each."""
    price, steps = plan.parameters.price_per_hour, plan.data.steps.total_steps
    shapes = " and ".join(map(format_size, probed.shapes))
    yield f"Probed      {pluralize(len(probed.step_seconds), 'step')} of {probed.batch} x {shapes} per micro-batch"
    yield f"Speed       {probed.mean_seconds:.3g} s a step, {probed.samples / probed.mean_seconds:.3g} samples/s"
    for speed in probed.encoding:
        count, seconds = speed.missing, format_duration(speed.seconds_left)
        left = f"{count} more {verb(count, 'takes', 'take')} about {seconds}" if count else "none is missing"
        yield f"Encoding    {speed.samples_per_second:.3g} samples/s of {speed.encoder}; {left}"
    encoding = " and encoding" if any(speed.missing for speed in probed.encoding) else ""
    yield f"Run         about {format_duration(probed.run_seconds)} for {pluralize(steps, 'step')}{encoding} at this speed"
    if price is not None:
        yield f"Cost        {price * probed.run_seconds / 3600:.2f}"
    estimated = f"the estimate is {format_memory(probed.estimated)}"
    if probed.peak is None:
        yield f"Memory      not measured on a CPU; {estimated}"
    else:
        yield f"Memory      {format_memory(probed.peak)} peak; {estimated}"

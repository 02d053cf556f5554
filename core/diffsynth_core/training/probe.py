"""The speed and memory of a run, measured on its largest samples; nothing is written but encodings."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from diffsynth_core.data.batches import BatchPlan, StepPlan
from diffsynth_core.models.registry import load_family
from diffsynth_core.planning.data.encodings import with_encodings
from diffsynth_core.planning.memory.disk import assumed_save_seconds
from diffsynth_core.planning.memory.estimate import device_memory
from diffsynth_core.planning.memory.memory_config import memory_config
from diffsynth_core.planning.memory.sizes import find_workload, largest_batch
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import Reporter, SilentReporter
from diffsynth_core.stop import StopRequest
from diffsynth_core.training.encode import EncodingSpeed, measure_encoders
from diffsynth_core.training.loader import iterate_micro_batches
from diffsynth_core.training.pace import Pace, seconds_left
from diffsynth_core.training.setup import load_for_steps, make_accelerator, make_optimizer
from diffsynth_core.training.trial import try_largest


@dataclass(frozen=True)
class Probed:
    """What was measured.

    Attributes:
        batch: samples of a micro-batch, each of `shapes` (frames, height, width).
        step_seconds: of each measured step.
        samples: of a step, over all processes.
        encoding: of each encoder that lacked encodings.
        run_seconds: of all steps and missing encodings at these speeds, and of all saves as they are assumed.
        peak: bytes allocated at most on the device; None on a CPU, where it is not measured.
        estimated: bytes that the plan expects at most.
    """

    batch: int
    shapes: Sequence[tuple[int, int, int]]
    step_seconds: tuple[float, ...]
    samples: int
    encoding: Sequence[EncodingSpeed]
    run_seconds: float
    peak: int | None
    estimated: int

    @property
    def mean_seconds(self) -> float:
        """Seconds of a step."""
        return sum(self.step_seconds) / len(self.step_seconds)


def probe(plan: RunPlan, reporter: Reporter, stop: StopRequest) -> Probed:
    """Measure as many steps as `probe` says after one that warms up. All processes call this together.

    Raises:
        DiffSynthError: as in training, before its first step.
        Interrupted: if a signal requested a stop.
        OutOfTime: if the time of `max_time` is over while encoding.
    """
    accelerator = make_accelerator(plan)
    reporter = reporter if accelerator.is_main_process else SilentReporter()
    family, count = load_family(plan.model.facts.name), plan.parameters.probe or 0
    encoding = measure_encoders(with_encodings(plan, reporter), family, accelerator, count, reporter, stop)
    small, model, engine = load_for_steps(_of_largest(plan), accelerator, reporter, stop)
    engine.prepare(model, partial(make_optimizer, small))
    try_largest(small, model, engine, accelerator.device, reporter)
    steps = small.data.steps
    micro_batches = iterate_micro_batches(small, accelerator.process_index)
    own, samples = plan.parameters.gradient_accumulation_steps, steps.samples_in(steps.slice(0))
    seconds = []
    with reporter.task("Probing", steps.total_steps, "steps") as task:
        for step in range(steps.total_steps):
            stop.raise_if_set()
            begun = time.perf_counter()
            engine.begin(plan.parameters.learning_rate, step)
            for index in range(own):
                engine.forward_backward(next(micro_batches), plan.machine.world_size / samples, last=index == own - 1)
            engine.gradient_norm()
            engine.step()
            if accelerator.device.type != "cpu":
                torch.accelerator.synchronize()
            seconds.append(time.perf_counter() - begun)
            task.advance()
    measured = tuple(seconds[1:])
    workload = find_workload(plan)
    estimated = device_memory(plan, memory_config(plan, workload.largest)).peak
    mean = sum(measured) / len(measured)
    return Probed(
        batch=workload.largest.batch,
        shapes=workload.largest.images,
        step_seconds=measured,
        samples=samples,
        encoding=encoding,
        run_seconds=seconds_left(plan, Pace(assumed_save_seconds(plan)), 0, mean)
        + sum(speed.seconds_left for speed in encoding),
        peak=None if accelerator.device.type == "cpu" else torch.accelerator.max_memory_allocated(),
        estimated=estimated,
    )


def _of_largest(plan: RunPlan) -> RunPlan:
    """The plan of one step more than are measured, all of largest micro-batches, with their samples alone."""
    steps, samples = plan.data.steps, plan.data.samples.samples
    refs = largest_batch(plan, steps.samples_needed(0))
    indices = list(dict.fromkeys(ref.sample for ref in refs))
    chosen, encoded = tuple(samples[index] for index in indices), plan.data.encoded
    if encoded:
        encoded = replace(encoded, samples=chosen, files=tuple(encoded.files[index] for index in indices))
    number = 1 + (plan.parameters.probe or 0)
    # So many passes over the samples give each step all of its micro-batches, each of them whole.
    passes = number * steps.micro_batches * len(refs)
    batches = BatchPlan([sample.bucket for sample in chosen], passes, len(refs), plan.parameters.seed)
    return replace(
        plan,
        data=replace(
            plan.data,
            samples=replace(plan.data.samples, samples=chosen),
            steps=StepPlan(batches, steps.micro_batches, 1, number),
            encoded=encoded,
            held_out=(),
        ),
    )

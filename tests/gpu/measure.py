"""One row, measured: `python -m tests.gpu.measure NAME SIZE FOLDER` prints the outcome as a line of JSON.

The module is built, prepared and loaded as in training, from files that are all header: their tensors are drawn on the
device when they are read.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from diffsynth_core.config.resolve import resolve
from diffsynth_core.data.batches import SampleRef
from diffsynth_core.data.media import MediaCrop
from diffsynth_core.data.samples import Sample, SampleSet
from diffsynth_core.models import loading
from diffsynth_core.models.registry import load_family
from diffsynth_core.models.size_facts import StepSizes
from diffsynth_core.models.tiny import published_name, write_json
from diffsynth_core.planning.data.encodings_plan import EncodingsPlan
from diffsynth_core.planning.memory.estimate import device_memory
from diffsynth_core.planning.memory.flops import step_flops
from diffsynth_core.planning.memory.memory_config import memory_config
from diffsynth_core.planning.memory.sizes import find_workload
from diffsynth_core.planning.plan import RunPlan, make_plan
from diffsynth_core.progress import SilentReporter
from diffsynth_core.randomness import key_of
from diffsynth_core.rehearsal.preparation import prepare
from diffsynth_core.training.engines import make_engine
from diffsynth_core.training.loader import MicroBatch
from diffsynth_core.training.model import build_training_module
from diffsynth_core.training.setup import make_accelerator, make_optimizer
from diffsynth_core.weights.base_files import Part
from diffsynth_core.weights.headers import make_header
from tests.gpu.rows import REHEARSED, Row, find_row

TRANSFORMER = "dit"


@dataclass(frozen=True)
class Outcome:
    """What a row measured; bytes and operations of one process.

    Attributes:
        size: `real`, or `rehearsal`, which says nothing of speed.
        losses: mean loss of each step.
        seconds: of a step.
        peak: most bytes of the device at once; None on a CPU.
        difference: largest relative difference of a loss to that of plain steps, for rows of correctness.
        fault: why there is no figure; empty: there is one.
    """

    row: str
    size: str
    device: str = ""
    torch: str = ""
    losses: tuple[float, ...] = ()
    seconds: float | None = None
    flops: float | None = None
    peak: int | None = None
    estimate: int | None = None
    difference: float | None = None
    fault: str = ""


def measure(row: Row, size: str, folder: Path) -> Outcome:
    """Measure a row: its speed, or its losses against those of plain steps."""
    kind = "cuda" if size == "real" else "cpu"
    row = row if size == "real" else replace(row, warm_up=1, steps=1)
    name = torch.cuda.get_device_name() if kind == "cuda" else "CPU"
    outcome = Outcome(row.name, size, name, torch.__version__)
    plan = make(row, size, folder, kind)
    if row.tolerance is None:
        return take_steps(row, plan, outcome)
    neutral = {"blocks_to_swap": 0} if "blocks_to_swap" in row.parameters else {}
    plain_row = replace(row, parameters={**row.parameters, **neutral, **row.plain}, storage="")
    plain = take_steps(row, make(plain_row, size, folder, kind), outcome)
    found = take_steps(row, plan, outcome)
    pairs = zip(found.losses, plain.losses, strict=True)
    return replace(found, difference=max(abs(loss / expected - 1) for loss, expected in pairs))


def make(row: Row, size: str, folder: Path, kind: str) -> RunPlan:
    """Return the plan of a row: of published sizes from headers, or of a rehearsal."""
    given = {"recipe": row.recipe, "device": kind, "cache_path": folder / "cache", "output_path": folder / "out"}
    given |= {"dataset_num_workers": 0, "max_steps": row.warm_up + row.steps, "mixed_precision": "bf16"}
    given |= row.parameters
    reporter = SilentReporter()
    if kind == "cpu":
        given |= {name: value for name, value in REHEARSED.items() if name in given} | {"max_pixels": 64 * 64}
        plain, base = prepare(resolve(given), reporter)
        entry = make_plan(plain, reporter, base=base).model.components[TRANSFORMER].origin
        return make_plan(prepare(resolve(given | _stored(row, entry)), reporter)[0], reporter, base=base)
    published = make_plan(resolve(given), reporter, base=folder / "models", without_files=True)
    entry = published.model.components[TRANSFORMER].origin
    write_headers(published, folder / "models")
    return make_plan(resolve(given | _stored(row, entry)), reporter, base=folder / "models", without_files=True)


def _stored(row: Row, entry: str) -> dict[str, Any]:
    return {"quant_options": {entry: row.storage}} if row.storage else {}


def write_headers(plan: RunPlan, base: Path) -> None:
    """Write the transformer's file: its header, and a hole of the size of its weights."""
    if TRANSFORMER not in plan.model.published:
        return
    config, shapes = plan.model.published[TRANSFORMER].config, plan.model.shapes[TRANSFORMER]
    model_id, _, pattern = plan.model.components[TRANSFORMER].origin.partition(":")
    path = base / model_id / pattern.replace("*", "")
    path = path.with_name(published_name(TRANSFORMER, path.name))
    path.parent.mkdir(parents=True, exist_ok=True)
    family = load_family(plan.model.facts.name)
    with torch.device("meta"):
        kind = type(family.build(TRANSFORMER, config)).__name__
    write_json(path.with_name("config.json"), {"_class_name": kind, **config})
    header = make_header([(name, "BF16", shape) for name, shape in shapes.items()], {"format": "pt"})
    with path.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + 2 * sum(map(math.prod, shapes.values())))


def draw_weights(
    device: torch.device, part: Part, skipped: Callable[[str], bool] = lambda name: False
) -> Iterator[tuple[str, Tensor, None]]:
    """Yield the tensors of a part as `iterate_weights` does, drawn on the device instead of read.

    Matrices have a standard deviation of 1 / sqrt(fan-in), and scales of norms are 1. Zeros would compute faster on a
    GPU, whose clock depends on the power that it draws.
    """
    for name, header in part.tensors.items():
        if skipped(name):
            continue
        if len(header.shape) == 1:
            value = torch.ones if name.endswith("weight") else torch.zeros
            yield name, value(header.shape, dtype=torch.bfloat16, device=device), None
        else:
            generator = torch.Generator(device).manual_seed(key_of("bench", name))
            drawn = torch.randn(header.shape, dtype=torch.bfloat16, device=device, generator=generator)
            yield name, drawn.mul_(math.prod(header.shape[1:]) ** -0.5), None


def take_steps(row: Row, plan: RunPlan, outcome: Outcome) -> Outcome:
    """Return an outcome with what steps of a plan take, on one micro-batch of its largest size."""
    sizes = find_workload(plan).largest
    plan = with_one_sample(plan, sizes)
    family, accelerator = load_family(plan.model.facts.name), make_accelerator(plan)
    engine = make_engine(plan, accelerator)
    with patch.object(loading, "iterate_weights", partial(draw_weights, accelerator.device)):
        model = build_training_module(plan, family, accelerator.device, SilentReporter(), engine.place)
    engine.prepare(model, partial(make_optimizer, plan))
    encoded = draw_encodings(family.blank_encoding(plan.model.variant, model.components[TRANSFORMER], sizes))
    on_gpu = accelerator.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    losses, started = [], 0.0
    for step in range(row.warm_up + row.steps):
        if step == row.warm_up:
            started = time.perf_counter()
        engine.begin(plan.parameters.learning_rate, step)
        batch = MicroBatch(0, (SampleRef(0, step),) * sizes.batch, (encoded,) * sizes.batch, ({},) * sizes.batch, True)
        loss = engine.forward_backward(batch, 1 / sizes.batch, last=True).mean()
        norm = engine.gradient_norm()
        losses.append(float(torch.stack([loss, norm])[0]))  # waits for the device once, as the loop does
        engine.step()
    if on_gpu:
        torch.cuda.synchronize()
    work = step_flops(plan, sizes)
    training = device_memory(plan, memory_config(plan, sizes)).training
    return replace(
        outcome,
        losses=tuple(losses),
        seconds=(time.perf_counter() - started) / row.steps,
        flops=work.total / plan.parameters.gradient_accumulation_steps if work else None,
        peak=torch.cuda.max_memory_allocated() if on_gpu else None,
        estimate=training.total if training else None,
    )


def with_one_sample(plan: RunPlan, sizes: StepSizes) -> RunPlan:
    """Return a plan whose only sample has these sizes, and is encoded already."""
    frames, height, width = sizes.images[0]
    sample = Sample(1, "", MediaCrop(Path(), height, width, frames=frames))
    data = replace(plan.data, samples=SampleSet((sample,), ()))
    return replace(plan, data=data, found_encodings=EncodingsPlan((), {}))


def draw_encodings(blank: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return random encodings of the same shapes and dtypes, on the CPU, from where training takes them."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(value.shape, generator=generator).to(value.dtype) for name, value in blank.items()}


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    for argument in ("row", "size", "folder"):
        arguments.add_argument(argument)
    asked = arguments.parse_args()
    print(json.dumps(asdict(measure(find_row(asked.row), asked.size, Path(asked.folder)))))

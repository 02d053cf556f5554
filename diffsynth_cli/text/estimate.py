"""The estimate of a plan as text: memory, disk space, and whether the run fits."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffsynth_cli.text.plan import DEVICES, format_size
from diffsynth_core.config.choices import SWAP_BUFFERS
from diffsynth_core.files import free_bytes, model_base_path
from diffsynth_core.planning.memory.disk import disk_use, download_bytes
from diffsynth_core.planning.memory.estimate import TrainingMemory, device_memory, host_memory, unknown_parts
from diffsynth_core.planning.memory.fitted import gpu_bytes, host_limit
from diffsynth_core.planning.memory.fitting import EngineFit, MemoryFit, engine_fits, find_fit
from diffsynth_core.planning.memory.flops import step_flops
from diffsynth_core.planning.memory.memory_config import MemoryConfig, memory_config
from diffsynth_core.planning.memory.sizes import ASSUMED_CAPTION, Workload, find_workload
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import format_bytes, format_memory, pluralize

TERA = 10**12


@dataclass(frozen=True)
class Estimate:
    """The estimate of a run, what its memory depends on, and the options that make it fit if `gpu_memory` is set; of
    several processes, the engines too."""

    run: Workload
    config: MemoryConfig
    fit: MemoryFit | None
    engines: tuple[EngineFit, ...] = ()


def make_estimate(plan: RunPlan) -> Estimate:
    """Estimate a run, and search for options that make it fit."""
    run = find_workload(plan)
    config = memory_config(plan, run.largest)
    limit = gpu_bytes(plan.parameters) if plan.parameters.gpu_memory or plan.parameters.fit else None
    if not limit:
        return Estimate(run, config, None)
    host = host_limit(plan, limit)
    fit = find_fit(plan, config, limit, host, run.encoded)
    several = plan.machine.world_size > 1 and plan.task.trains
    return Estimate(run, config, fit, tuple(engine_fits(plan, config, limit, host, run.encoded)) if several else ())


def engine_lines(plan: RunPlan, engines: Sequence[EngineFit], limit: int) -> Iterator[str]:
    """What a run takes in each of several processes with each engine, and which is the fastest that fits."""
    yield f"Each of {plan.machine.world_size} processes, in {format_memory(limit)}"
    for engine in engines:
        yield f"  {_memory(engine.peak)}  {engine.flags}{': fits' if engine.fits else ''}"
    fastest = next((engine for engine in engines if engine.fits), None)
    if fastest and fastest.configuration == "ddp" and plan.machine.engine.spec.shards:
        yield f"It fits without sharding, which is faster: pass `{fastest.flags}`"
    elif fastest:
        yield f"The fastest of those that fit is `{fastest.flags}`"


def estimate_lines(plan: RunPlan, estimate: Estimate) -> Iterator[str]:
    """Memory and disk space of a run by part, what is not included, and the options that were tried."""
    run, config = estimate.run, estimate.config
    sizes, memory = run.largest, device_memory(plan, config)
    shown = " and ".join(format_size(image) for image in sizes.images)
    basis = (
        "the largest micro-batch of the dataset"
        if plan.data.samples.samples
        else "the largest that the parameters allow"
    )
    yield f"{DEVICES[config.device]} memory, estimated for {basis}: {sizes.batch} of {shown}, precision {config.precision}"
    if memory.training:
        yield from _table(_training_parts(plan, config, memory.training))
    for part in memory.encoding:
        parts = "weights and largest feature maps" if part.activations else "weights"
        yield f"  {_memory(part.total)}  {part.component} while encoding, before training: {parts}"
    if decoding := memory.decoding:
        what = "weights and largest feature maps" if decoding.activations else "weights"
        yield f"  {_memory(decoding.total)}  {decoding.component} while decoding previews, beside what trains: {what}"
    yield f"  {_memory(memory.peak)}  peak"
    yield f"  excludes {', '.join(('kernel workspace and driver overhead', *unknown_parts(plan)))}"
    if plan.task.trains and (work := step_flops(plan, sizes)):
        forward, backward, recomputed, total = (
            f"{flops / TERA:.1f}" for flops in (work.forward, work.backward, work.recomputed, work.total)
        )
        passes = f"forward {forward}, backward {backward}, recomputed {recomputed}"
        yield f"Matrix products of a step in each process: {total} TFLOP ({passes})"
    yield "Host memory, without Python and its libraries"
    yield from _table(host_memory(plan, config, memory, run.encoded))
    yield from _disk_lines(plan, config, run)
    if estimate.fit:
        yield from candidate_lines(estimate.fit)


def _training_parts(plan: RunPlan, config: MemoryConfig, training: TrainingMemory) -> dict[str, int]:
    """Device memory during training by part, and the total; of parts that are never needed together, the larger one
    counts."""
    optimizer, engine = config.optimizer.spec.title, plan.machine.engine.spec
    kept = "recomputed block by block" if config.recompute else "all stored"
    waiting = ", block inputs offloaded to host memory" if training.on_host else ""
    moved = ", when all activations are offloaded to host memory" if training.on_host else ""
    optional = {
        f"activations ({kept}{waiting})": training.activations,
        f"autocast copies of the weights, at the end of a forward pass{moved}": training.autocast_weights,
        f"temporary buffers of the {optimizer} step, after activations are freed": training.update
        if training.update_is_fullest
        else 0,
        "the update of the largest tensor": training.update if training.updated_in_passes else 0,
        "a copy of trained weights while their averages are evaluated": training.set_aside,
    }
    suffix = f", with the {optimizer} step instead of activations" if training.update_is_fullest else ""
    return {
        **{f"weights of {name}": size for name, size in training.weights.items()},
        **(
            {f"swapped blocks while they are on the device, {SWAP_BUFFERS} at a time": training.swap_buffers}
            if training.swapped
            else {}
        ),
        **({"weights gathered while they are used": training.gathered} if training.gathered else {}),
        **({"LoRA": training.adapters} if training.adapters else {}),
        "gradient of the largest tensor" if training.updated_in_passes else "gradients": training.gradients,
        **(
            {f"gradients on their way to other processes ({engine.title})": training.buckets}
            if training.buckets
            else {}
        ),
        f"optimizer state ({optimizer}{', and averages of weights' if config.optimizer.ema_decay else ''})": training.optimizer,
        **{name: size for name, size in optional.items() if size},
        f"training in total{suffix}": training.total,
    }


def _disk_lines(plan: RunPlan, config: MemoryConfig, run: Workload) -> Iterator[str]:
    disk = disk_use(plan, config, run.encoded)
    samples = len(plan.data.samples.samples)
    yield "Disk"
    if fetched := download_bytes(plan):
        base = model_base_path()
        yield f"  {_amount(fetched)}  model files to download, in `{base}`{_free(base, fetched)}"
    if not plan.data.encoded:
        where = plan.output.cache if plan.task.trains else plan.parameters.output_path
        what = f"encodings of {pluralize(samples, 'sample')}" if samples else "encodings of each sample"
        how = "" if run.counted else f", {_letters(plan)}"
        yield f"  {_amount(disk.cache)}  {what}{how}, in `{where}`{_free(where, disk.cache)}"
    for name, size in disk.packed.items():
        where = plan.output.cache
        yield f"  {_amount(size)}  quantized weights of {name} for the next start, in `{where}`{_free(where, size)}"
    if plan.task.trains:
        many = f"{pluralize(disk.checkpoints, 'checkpoint')} of {format_bytes(disk.checkpoint)}"
        what = many if disk.checkpoints else "each checkpoint"
        written = disk.written
        state = f"{pluralize(disk.states, 'state')} to resume from ({format_bytes(disk.state)} each, including the one being written)"
        where = plan.parameters.output_path
        yield f"  {_amount(written)}  {what} and {state}, in `{where}`{_free(where, written)}"
    yield "  encoding time depends on the GPU and is not estimated"


def disk_parts(plan: RunPlan, estimate: Estimate) -> dict[str, tuple[Path, int]]:
    """Each output of a run: a label, its folder and its size in bytes; outputs that do not exist are omitted."""
    disk = disk_use(plan, estimate.config, estimate.run.encoded)
    output = plan.parameters.output_path
    many = "encodings" if plan.data.samples.samples else "encodings of each sample"
    parts = {
        "download": (model_base_path(), download_bytes(plan)),
        many: (plan.output.cache if plan.task.trains else output, disk.cache),
        "quantized weights": (plan.output.cache, sum(disk.packed.values())),
        "checkpoints and states" if disk.checkpoints else "a checkpoint and states": (output, disk.written),
    }
    return {name: (folder, size) for name, (folder, size) in parts.items() if size}


def _letters(plan: RunPlan) -> str:
    """How caption tokens were counted without a tokenizer."""
    if plan.data.samples.samples:
        return "caption tokens estimated from characters, as the tokenizer is missing"
    return f"for a caption of {ASSUMED_CAPTION} characters"


def _free(folder: Path, needed: int) -> str:
    """The free space of the disk that holds a folder, and whether it is enough."""
    free = free_bytes(folder)
    return f", {format_bytes(free)} free{': not enough' if needed > free else ''}"


def candidate_lines(fit: MemoryFit) -> Iterator[str]:
    """The options that were tried to make a run fit."""
    if fit.fits_unchanged:
        return
    yield f"Options to fit in {format_memory(fit.limit)}, cheapest first"
    for trial in fit.tried:
        fits = ": fits" if trial is fit.tried[-1] and fit.fits else ""
        yield f"  {_memory(trial.peak)}  {trial.words}{fits}"


def verdict_line(fit: MemoryFit) -> str:
    """Whether a run fits."""
    limit = format_memory(fit.limit)
    needed = f"needs {format_memory(fit.peak)}"
    if not fit.fits_unchanged:
        way = "the changes below make it fit" if fit.fits else "none of the options makes it fit"
        return f"Does not fit in {limit}: {needed}; {way}"
    left = f"{format_memory(fit.left)} left for overhead"
    return f"{'Tight' if fit.is_tight else 'Fits'} in {limit}: {needed}, {'only ' if fit.is_tight else ''}{left}"


def option_lines(fit: MemoryFit, stage: str | None = None) -> Iterator[str]:
    """The flags that make a run fit, as typed on the command line."""
    if fit.fits_unchanged or not fit.fits:
        return
    last = fit.tried[-1]
    tight = f" (tight: {format_memory(fit.left)} left)" if fit.is_tight else ""
    yield f"To make it fit, with a peak of {format_memory(last.peak)}{tight}, pass"
    flags = [*([f"--only {stage}"] if stage else []), *(change.flag for change in fit.changes)]
    yield " \\\n".join(f"  {flag}" for flag in flags)


def _table(parts: Mapping[str, int]) -> Iterator[str]:
    for name, size in parts.items():
        yield f"  {_memory(size)}  {name}"


def _memory(size: int) -> str:
    """Memory in bytes, formatted as a column."""
    return f"{format_memory(size):>9}"


def _amount(size: int) -> str:
    """Disk space in bytes, formatted as a column."""
    return f"{format_bytes(size):>9}"

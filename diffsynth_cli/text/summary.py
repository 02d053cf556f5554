"""A plan in about ten lines: what is trained on what, for how long, and what it needs. `--verbose` prints the full
plan."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from diffsynth_cli.text.estimate import Estimate, disk_parts
from diffsynth_cli.text.plan import (
    DEVICES,
    compiled_in_words,
    family_default_lines,
    format_size,
    list_sizes,
    previewed_in_words,
    shared_in_words,
    start_lines,
    steps_in_words,
    swapped_in_words,
    validated_in_words,
)
from diffsynth_core.config.documents import flag
from diffsynth_core.config.parameters import as_plain
from diffsynth_core.files import disk_id, free_bytes
from diffsynth_core.hub.model_files import MissingFiles
from diffsynth_core.planning.memory.disk import assumed_save_seconds, checkpoint_bytes, download_bytes, state_bytes
from diffsynth_core.planning.memory.estimate import device_memory, host_memory
from diffsynth_core.planning.memory.memory_config import device_and_precision
from diffsynth_core.planning.memory.trained_sizes import count_trained
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import format_bytes, format_count, format_duration, format_memory, pluralize

PRECISIONS = {"no": "float32"}
"""Names of `mixed_precision` values as dtypes, where they differ."""
ALL = "`--verbose` prints the rest: files, modules, parameters, memory and disk usage by part"


def summary_lines(plan: RunPlan, estimate: Estimate | None = None) -> Iterator[str]:
    """The summary of a plan: one line per fact, after its label.

    Args:
        estimate: memory and disk space, if requested; it is for a GPU even if this machine has none.
    """
    yield _labeled("Model", _model(plan, estimate is not None))
    if plan.task.trains:
        yield _labeled("Trains", _trained(plan))
        for line in family_default_lines(plan):
            yield _labeled("", line)
        if plan.parameters.blocks_to_swap:
            yield _labeled("Placement", swapped_in_words(plan))
    if plan.fitted:
        values = as_plain(plan.parameters)
        yield _labeled("Fit", f"`--fit` set {' '.join(flag(name, values[name]) for name in plan.fitted)}")
    missing = [problem for problem in plan.missing if isinstance(problem, MissingFiles)]
    if missing:
        yield _labeled("Missing", _missing(plan, len(missing)))
    yield _labeled("Dataset", _dataset(plan))
    for note in plan.data.samples.notes:
        yield _labeled("", note)
    if plan.task.trains:
        yield _labeled("Steps", _steps(plan))
        if plan.parameters.compile and plan.data.samples.samples:
            yield _labeled("", compiled_in_words(plan))
        if plan.data.held_out:
            yield _labeled("", f"validated on {validated_in_words(plan)}")
        if plan.previews:
            yield _labeled("", previewed_in_words(plan))
        for note in start_lines(plan):
            yield _labeled("", note)
    if plan.parameters.max_time:
        yield _labeled("Time", _time(plan))
    if estimate:
        yield _labeled("Memory", _memory(plan, estimate))
        yield _labeled("Disk", _disk(plan, estimate))
    yield _labeled("Output", f"`{plan.parameters.output_path}`")
    for line in shared_in_words(plan):
        yield _labeled("", line)


def _labeled(label: str, text: str) -> str:
    return f"{label:<9} {text}"


def _model(plan: RunPlan, estimated: bool) -> str:
    """The model variant and the device: the planned one and, separately, that of this machine."""
    title, here = plan.model.variant.title, f"on {plan.machine.device} in {_dtype(plan.machine.mixed_precision)}"
    if not estimated:
        return f"{title} {here}"
    device, precision = device_and_precision(plan.parameters, plan.machine)
    if (plan.machine.device.partition(":")[0] == "cpu") == (
        device == "cpu"
    ) and precision == plan.machine.mixed_precision:
        return f"{title} {here}"
    return f"{title} on a {DEVICES[device]} in {_dtype(precision)}; this machine has none and would run {here}"


def _dtype(precision: str) -> str:
    return PRECISIONS.get(precision, precision)


def _trained(plan: RunPlan) -> str:
    training = plan.training
    what = [f"{name} in full" for name in sorted(training.full)]
    what += [f"{', '.join(modules)} of {name}" for name, modules in training.parts.items()]
    if training.lora_component:
        modules = pluralize(len(training.lora_modules), "module")
        what.append(f"LoRA of rank {plan.parameters.lora_rank} on {modules} of {training.lora_component}")
    kept = ""
    if training.dtype == "bf16":
        kept = ", kept in bf16" + (", updated in float32" if plan.machine.engine.spec.updates_copies else "")
    return f"{' and '.join(what)}: {format_count(count_trained(plan))} parameters{kept}"


def _missing(plan: RunPlan, number: int) -> str:
    """The model files to download, in one line."""
    names = list(plan.model.published)
    names += ["tokenizer"] if number > len(names) else []
    size = f", {format_bytes(download_bytes(plan))} to download" if plan.model.published else ""
    recipe = plan.parameters.recipe
    how = (
        f"`diffsynth download {recipe}` downloads them, and so does the run"
        if recipe
        else "the run downloads them first"
    )
    return f"model files ({', '.join(names)}){size}; {how}"


def _dataset(plan: RunPlan) -> str:
    samples, folder = plan.data.samples.samples, plan.parameters.dataset_base_path
    if not samples:
        return f"`{folder}` does not exist, so the number of steps is unknown"
    sizes = Counter(sample.target.shape for sample in samples)
    encoded = ", precomputed encodings" if plan.data.encoded else ""
    number = f"{len(samples)} sample{'' if len(samples) == 1 else 's'}"
    return f"{number} from `{folder}`{encoded}: {list_sizes(sizes)}"


def _steps(plan: RunPlan) -> str:
    if not plan.data.steps.total_steps:
        return "unknown without a dataset, and so is the run time"
    return f"{steps_in_words(plan)}; the time per step is known after the first ones"


def _time(plan: RunPlan) -> str:
    """When the run stops, and how long it takes a save to take until it has measured one."""
    stops = f"at most {plan.parameters.max_time} for this command, encoding included"
    if not (plan.task.trains and plan.data.steps.total_steps):
        return stops
    assumed, written = assumed_save_seconds(plan), checkpoint_bytes(plan) + state_bytes(plan)
    seconds = format_duration(assumed.checkpoint + assumed.state)
    return f"{stops}; a save of {format_bytes(written)} is assumed to take {seconds} until one is measured"


def _memory(plan: RunPlan, estimate: Estimate) -> str:
    config = estimate.config
    memory = device_memory(plan, config)
    largest = " and ".join(format_size(image) for image in config.sizes.images)
    host = sum(host_memory(plan, config, memory, estimate.run.encoded).values())
    device = f"{format_memory(memory.peak)} peak on the {DEVICES[config.device]}"
    return f"{device}, for {config.sizes.batch} of {largest}; {format_memory(host)} of host memory"


def _disk(plan: RunPlan, estimate: Estimate) -> str:
    """The total size of all outputs, its main parts, and the free space of the disks they are written to."""
    parts = disk_parts(plan, estimate)
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, (_, size) in parts.items())
    needed: dict[int, int] = {}
    folders: dict[int, Path] = {}
    for folder, size in parts.values():
        disk = disk_id(folder)
        needed[disk] = needed.get(disk, 0) + size
        folders.setdefault(disk, folder)
    free = [_free(folders[disk], size, len(needed) > 1) for disk, size in needed.items()]
    return f"{format_bytes(sum(needed.values()))} ({listed}); {', '.join(free)}"


def _free(folder: Path, needed: int, named: bool) -> str:
    """The free space of the disk that holds a folder, and whether it is enough."""
    free = free_bytes(folder)
    where = f" for `{folder}`" if named else ""
    return f"{format_bytes(free)} free{where}{': not enough' if needed > free else ''}"

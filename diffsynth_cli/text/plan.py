"""A plan as text."""

from collections import Counter
from collections.abc import Iterator, Sequence

from diffsynth_core.config.choices import SWAP_BUFFERS, TRAINING_TIMESTEPS
from diffsynth_core.config.documents import format_value
from diffsynth_core.config.parameters import SETTINGS, as_plain
from diffsynth_core.errors import list_names
from diffsynth_core.hub.client import download_source
from diffsynth_core.models.spec import ComponentFiles
from diffsynth_core.planning.data.encodings import encodings_are_known, plan_encodings
from diffsynth_core.planning.drawing.preview_steps import count_drawings, passes_of_drawing
from diffsynth_core.planning.memory.block_swap import swappable_blocks
from diffsynth_core.planning.memory.disk import checkpoint_bytes, file_bytes, has_scales, state_bytes
from diffsynth_core.planning.memory.estimate import count_parameters
from diffsynth_core.planning.memory.host_memory import shortage_here
from diffsynth_core.planning.memory.memory_config import device_and_precision
from diffsynth_core.planning.memory.sizes import count_batch_shapes, most_batch_shapes
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.planning.training.lora_targets import kinds_of
from diffsynth_core.planning.training.validation import count_bands, count_validations
from diffsynth_core.progress import Reporter, format_bytes, format_count, format_memory, pluralize, verb

SHOWN_SIZES = 6
WARNING = "warning: "
VAE = "vae"
"""The component, in every family, whose latents are trained on."""


DEVICES = {"cpu": "CPU", "cuda": "GPU"}
"""Descriptions of device types; `cuda` is used for all accelerators."""


def plan_lines(plan: RunPlan, reporter: Reporter, estimated: bool = False) -> Iterator[str]:
    """The full plan: one line per fact.

    `estimated`: an estimate follows, which is for a GPU even if this machine has none.
    """
    yield from _machine_lines(plan, estimated)
    yield from _tf32_lines(plan, estimated)
    yield from _component_lines(plan)
    if plan.task.trains and plan.parameters.blocks_to_swap:
        yield f"  {swapped_in_words(plan)}"
    if plan.task.trains and plan.training.optimizer.fused:
        yield f"  {plan.training.optimizer.spec.title} updates weights in a fused kernel; `--optimizer_args fused=false` turns that off"
    yield from _sample_lines(plan)
    if plan.task.trains:
        yield from family_default_lines(plan)
        yield from _step_lines(plan)
    yield from _encoding_lines(plan, reporter)
    yield f"Output to `{plan.parameters.output_path}`"
    for line in shared_in_words(plan):
        yield f"  {line}"


def parameter_lines(plan: RunPlan) -> Iterator[str]:
    """The parameters with values other than their defaults, one per line, and how to show all."""
    yield "Parameters that differ from their defaults"
    plain = as_plain(plan.parameters)
    for name, setting in SETTINGS.items():
        value = getattr(plan.parameters, name)
        of_family = name in plan.family_defaults
        if setting.listed and (value != setting.default_of(plan.model.facts.name) or of_family):
            origin = f" (default of {plan.model.facts.title})" if of_family else ""
            yield f"  {name:<28} {format_value(plain[name]).replace(',', ', ')}{origin}"
    if plan.parameters.recipe:
        yield f"  all parameters of the recipe: `diffsynth recipe show {plan.parameters.recipe}`"


def _machine_lines(plan: RunPlan, estimated: bool) -> Iterator[str]:
    """The model variant and the device: the planned one and, separately, that of this machine."""
    title, seed, here = plan.model.variant.title, plan.parameters.seed, plan.machine.device.partition(":")[0]
    device, precision = device_and_precision(plan.parameters, plan.machine)
    if not estimated or ((here == "cpu") == (device == "cpu") and precision == plan.machine.mixed_precision):
        yield f"{title} on {plan.machine.device}, precision {plan.machine.mixed_precision}, seed {seed}"
        return
    yield f"{title} on a {DEVICES[device]}, precision {precision}, seed {seed}"
    other = "" if precision == plan.machine.mixed_precision else f", precision {plan.machine.mixed_precision}"
    yield f"  planned for a {DEVICES[device]}; this machine has none and would train on {plan.machine.device}{other}"


def _tf32_lines(plan: RunPlan, estimated: bool) -> Iterator[str]:
    """Which float32 operations of a CUDA device round their inputs."""
    device = device_and_precision(plan.parameters, plan.machine)[0] if estimated else plan.machine.device
    if device.partition(":")[0] == "cuda":
        yield f"  TF32 in float32 operations of CUDA devices: {', '.join(plan.machine.tf32) or 'none'}"


def _component_lines(plan: RunPlan) -> Iterator[str]:
    for name, files in plan.model.components.items():
        yield f"  {name:<15} {_where(plan, name, files)}{_part(plan, name)}"
    for name, files in plan.model.unused_components.items():
        yield f"  {name:<15} {files.origin}, not loaded by `{plan.task.name}`"
    if plan.task.encodes and not plan.task.trains and plan.model.facts.denoiser not in plan.model.unused_components:
        yield f"  without a {plan.model.facts.denoiser}, the kind of model is inferred from the files and `extra_inputs`: {plan.model.variant.title}"
    if plan.training.lora_rule:
        yield f"  LoRA is applied to {plan.training.lora_rule}: {_kinds(plan.training.lora_modules)}"
    if plan.training.start:
        yield f"  {plan.training.start.note}"
    if plan.training.untrainable_targets:
        yield f"  excluded: {pluralize(len(plan.training.untrainable_targets), 'LoRA module')} without gradient: {', '.join(plan.training.untrainable_targets)}"
    if plan.training.skipped_modules:
        yield f"  no LoRA on {pluralize(len(plan.training.skipped_modules), 'module')} of the same kinds: {list_names(plan.training.skipped_modules)}"
    if VAE in plan.training.components:
        yield f"  the {VAE} is trained: the prediction target is computed from its latents and changes with them"


def _where(plan: RunPlan, component: str, files: ComponentFiles) -> str:
    """The source of a component and its size on disk."""
    size = format_bytes(file_bytes(plan, component))
    if component not in plan.model.published:
        below = f" below `{files.prefix}`" if files.prefix else ""
        there = f"{pluralize(len(files.paths), 'file')}{below}, {size}"
    elif plan.model.published[component].parameters:
        there = f"missing, {size} as published"
    else:
        there = "missing, size unknown"
    return f"{files.origin} ({there}, {_parameters(plan, component)})"


def _sample_lines(plan: RunPlan) -> Iterator[str]:
    parameters, samples = plan.parameters, plan.data.samples.samples
    if not samples:
        yield f"No dataset: `{parameters.dataset_base_path}` does not exist, so buckets and steps are unknown"
        return
    sizes = Counter(sample.target.shape for sample in samples)
    yield f"{pluralize(len(samples), 'sample')} from `{parameters.dataset_base_path}`: {list_sizes(sizes)}"
    if plan.data.encoded:
        origin = plan.data.encoded.origin
        asked = "".join(f", {name} {value}" for name, value in origin.sizes.items() if value is not None)
        yield f"  precomputed for {origin.kind}, precision {origin.precision}{asked}: neither metadata nor media are read"
    if plan.model.variant.conditions and parameters.batch_size > 1:
        yield f"  {len(plan.data.steps.batches.buckets)} batch shapes, since reference images have sizes too"
    if not plan.data.encoded:
        yield from _transform_lines(plan)
    for shown in plan.model.variant.conditions:
        images = [crop for sample in samples for crop in sample.conditions[shown.name]]
        yield f"  reference images ({shown.name}): {list_sizes(Counter(crop.shape for crop in images))}"
    for note in plan.data.samples.notes:
        yield f"  {note}"


def warning_lines(plan: RunPlan) -> Iterator[str]:
    """The notes of a plan, and what this machine lacks for it; the caller colors the first word."""
    for warning in (*plan.warnings, *shortage_here(plan)):
        yield f"{WARNING}{warning.message}"
        if warning.hint:
            yield f"  hint: {warning.hint}"


def _transform_lines(plan: RunPlan) -> Iterator[str]:
    parameters = plan.parameters
    if parameters.height and parameters.width:
        yield f"  each is resized to cover {parameters.width} x {parameters.height} and center-cropped"
    if plan.model.variant.target.kind == "video" and (parameters.frame_rate or parameters.clip_start != "first"):
        rate = f"resampled to {parameters.frame_rate:g} frames per second, " if parameters.frame_rate else ""
        yield f"  {rate}part used of longer videos: {parameters.clip_start}"


def family_default_lines(plan: RunPlan) -> Iterator[str]:
    """Options that were enabled automatically."""
    for name in plan.family_defaults:
        if getattr(plan.parameters, name) is True:
            yield f"`{name}` is on by default for {plan.model.facts.title}; `--no-{name}` turns it off"


def _step_lines(plan: RunPlan) -> Iterator[str]:
    parameters, steps = plan.parameters, plan.data.steps
    if not steps.total_steps:
        return
    yield steps_in_words(plan)
    low, high = parameters.min_timestep_boundary, parameters.max_timestep_boundary
    if (low, high) != (0, 1):
        first, end = (int(share * TRAINING_TIMESTEPS) for share in (low, high))
        yield f"  timesteps {first} to {end - 1} of {TRAINING_TIMESTEPS}, noisiest first"
    if parameters.find_unused_parameters:
        yield "  unused parameters are excluded, so `find_unused_parameters` has no effect"
    if parameters.compile:
        yield f"  {compiled_in_words(plan)}"
    if parameters.ema_decay:
        yield f"  an average of the weights (decay {parameters.ema_decay:g}) is kept, and saved beside each checkpoint"
    if plan.data.held_out:
        yield f"  validated on {validated_in_words(plan)}"
    if plan.previews:
        yield f"  {previewed_in_words(plan)}"
    for note in start_lines(plan):
        yield f"  {note}"


def validated_in_words(plan: RunPlan) -> str:
    """On what a run validates, when, and how many forward passes that takes."""
    parameters, total = plan.parameters, plan.data.steps.total_steps
    held, bands = len(plan.data.held_out), count_bands(plan.parameters)
    every = f", every {pluralize(parameters.validate_every, 'step')}" if parameters.validate_every else ""
    averaged = ", with averaged weights" if parameters.evaluate_ema else ""
    times = 1 + count_validations(plan, 0, total)
    passes = pluralize(times * held * bands, "forward pass", "forward passes")
    per_epoch, epochs = plan.data.steps.batches.samples_per_epoch, total / plan.data.steps.steps_per_epoch
    return (
        f"{pluralize(held, 'held-out sample')} at {pluralize(bands, 'timestep')} each{averaged}, before the first step{every} and with "
        f"each checkpoint: {passes}, beside about {round(epochs * per_epoch)} forward and backward in training"
    )


def previewed_in_words(plan: RunPlan) -> str:
    """What a run draws, when, and what that takes."""
    job, every = plan.previews[0], plan.parameters.preview_every
    what = f"{pluralize(len(plan.previews), 'preview')} of {format_size((job.num_frames, job.height, job.width))}"
    steps = f"{pluralize(job.steps, 'sampling step')}{' each' if len(plan.previews) > 1 else ''}"
    when = f"every {pluralize(every, 'step')}" if every else "with each checkpoint"
    times = 1 + count_drawings(plan, 0, plan.data.steps.total_steps)
    passes = pluralize(times * passes_of_drawing(plan), "forward pass", "forward passes")
    loaded = f"{plan.model.variant.decoder} is loaded beside the model to decode them"
    return f"{what} in {steps}, before the first step, {when} and after the last: {passes}; {loaded}"


def shared_in_words(plan: RunPlan) -> Iterator[str]:
    """Where a run is copied while it goes on, and how much each time."""
    parameters, checkpoint, state = plan.parameters, format_bytes(checkpoint_bytes(plan)), state_bytes(plan)
    if parameters.mirror:
        yield f"copied to `{parameters.mirror}`: {checkpoint} with each checkpoint and {format_bytes(state)} with each state"
    if parameters.push_to_hub:
        hub = download_source(parameters.hub)
        readers = "which everybody can read" if parameters.hub_public else "created private unless it exists"
        yield f"uploaded to `{parameters.push_to_hub}` ({hub}), {readers}: {checkpoint} with each checkpoint"


def compiled_in_words(plan: RunPlan) -> str:
    """For how many batch shapes blocks are compiled."""
    (shapes, counted), most = count_batch_shapes(plan), most_batch_shapes(plan)
    about = "" if counted else "about "
    limit = f", more than the {most} that PyTorch compiles, so the run will not start" if shapes > most else ""
    return (
        f"blocks of {plan.model.facts.denoiser} are compiled for up to {about}{pluralize(shapes, 'batch shape')}{limit}"
    )


def steps_in_words(plan: RunPlan) -> str:
    """The number of optimizer steps, and how it is computed."""
    parameters, steps, repeat = plan.parameters, plan.data.steps, plan.parameters.dataset_repeat
    samples = pluralize(steps.batches.samples_per_epoch // repeat, "sample") + (f" x {repeat}" if repeat > 1 else "")
    machine = plan.machine
    processes = pluralize(machine.world_size, "process", "processes")
    if machine.context_parallel > 1:
        groups = pluralize(machine.data_parallel, "group")
        processes = f"{groups} of {machine.context_parallel} processes, which compute a sample together"
    return (
        f"{pluralize(steps.total_steps, 'step')} ({steps.steps_per_epoch} per epoch of {samples}; "
        f"{parameters.batch_size} per micro-batch x {parameters.gradient_accumulation_steps} accumulated x {processes})"
    )


def swapped_in_words(plan: RunPlan) -> str:
    """How many blocks wait in host memory, and why so many."""
    number, denoiser = plan.parameters.blocks_to_swap, plan.model.facts.denoiser
    blocks = len(swappable_blocks(plan.model, plan.training))
    chosen = f", chosen for {format_memory(plan.blocks_chosen_for)} of GPU memory" if plan.blocks_chosen_for else ""
    of_all = f"{number} of {pluralize(blocks, 'block')}" if blocks else f"{number} blocks"
    at_once = f"{SWAP_BUFFERS} {'parts ' if plan.parameters.cpu_offload_split_threshold is not None else ''}at a time"
    return f"{of_all} of {denoiser} wait in host memory{chosen}; {at_once} are copied to the device"


def start_lines(plan: RunPlan) -> Iterator[str]:
    """Notes on where a run starts or resumes."""
    yield from (*plan.output.start.notes, *plan.output.start.warnings)


def _encoding_lines(plan: RunPlan, reporter: Reporter) -> Iterator[str]:
    if plan.data.encoded or plan.missing:
        return
    if not encodings_are_known(plan):
        where = "the cache" if plan.task.trains else "the output folder"
        yield f"  encodings are computed once and stored in {where}"
        return
    for part in plan_encodings(plan, reporter).encoders:
        entries = len(set(part.keys.values()))
        done = entries - len(part.missing)
        loads = f"{part.encoder.component} is loaded" if part.missing else f"{part.encoder.component} is not loaded"
        yield f"  {part.encoder.name:<14} " + (
            "encoded in every step (the encoder is being trained)"
            if part.online
            else f"{done} of {pluralize(entries, 'encoding')} {verb(done, 'is', 'are')} in the cache; {loads}"
        )


def _parameters(plan: RunPlan, component: str) -> str:
    """The number of parameters of a component."""
    count = count_parameters(plan, component)
    return f"{format_count(count)} parameters" if count else "parameters unknown"


def _kinds(modules: Sequence[str]) -> str:
    """The number of LoRA modules by block and kind."""
    return "; ".join(
        f"{names.total()} in {blocks or 'no block'} ({', '.join(names)})" for blocks, names in kinds_of(modules).items()
    )


def _part(plan: RunPlan, component: str) -> str:
    parts = []
    if component in plan.model.stored:
        parts.append(_stored(plan.model.stored[component], plan.model.components[component].storage))
    elif has_scales(plan, component):
        parts.append("upcast from scaled 8-bit floats when loaded")
    if plan.model.fused_lora and component == plan.model.fused_lora.component:
        parts.append(f"`{plan.model.fused_lora.file.path}` merged into {plan.model.fused_lora.changes}")
    if component in plan.training.full:
        parts.append("trained in full")
    if modules := plan.training.parts.get(component):
        parts.append(f"trained in part: {', '.join(modules)}")
    if component == plan.training.lora_component:
        parts.append(
            f"LoRA of rank {plan.parameters.lora_rank} on {pluralize(len(plan.training.lora_modules), 'module')}"
        )
    return f", {' and '.join(parts)}" if parts else ""


def _stored(share: float | None, storage: str) -> str:
    storage = storage.partition("/")[0]  # without the modules that are left out
    if share is None:
        return f"weights stored in {storage} (share unknown without its files)"
    return f"{share:.0%} of its weights stored in {storage}" if share else f"no weights that can be stored in {storage}"


def list_sizes(sizes: Counter[tuple[int, int, int]]) -> str:
    """The number of samples of each size; the first few sizes."""
    listed = ", ".join(f"{number} of {format_size(size)}" for size, number in list(sizes.items())[:SHOWN_SIZES])
    more = len(sizes) - SHOWN_SIZES
    return f"{listed} and {more} more sizes" if more > 0 else listed


def format_size(shape: tuple[int, int, int]) -> str:
    """Format (frames, height, width) as `width x height`, with the frames of a clip."""
    frames, height, width = shape
    return f"{width} x {height}" + (f" x {pluralize(frames, 'frame')}" if frames > 1 else "")

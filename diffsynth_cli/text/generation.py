"""What a `generate` command draws, in a dozen lines and as JSON."""

from collections.abc import Iterator
from typing import Any

from diffsynth_core.config.gpu_memory import memory_bytes
from diffsynth_core.errors import truncate
from diffsynth_core.generation.generation_plan import GenerationPlan
from diffsynth_core.generation.memory import find_storage, sizes_are_known, weights_at_once, weights_fit
from diffsynth_core.generation.plan import Generation
from diffsynth_core.hub.model_files import MissingFiles
from diffsynth_core.planning.drawing.jobs import GenerationJob
from diffsynth_core.planning.memory.disk import download_bytes, file_bytes
from diffsynth_core.planning.memory.memory_config import device_and_precision
from diffsynth_core.progress import format_bytes, format_memory, pluralize

PRECISIONS = {"no": "float32"}
"""Names of `mixed_precision` values as dtypes, where they differ."""
LISTED = 8
"""Maximum number of prompts that are listed."""
SHOWN = 60
"""Maximum number of characters of a prompt that are shown."""


def plan_lines(generation: Generation) -> Iterator[str]:
    """The plan: one line per fact, after its label."""
    plan, job = generation.plans[0], generation.plans[0].jobs[0]
    precision = plan.machine.mixed_precision
    model = plan.model.variant.title
    yield _labeled("Model", f"{model} on {plan.machine.device} in {PRECISIONS.get(precision, precision)}")
    for number, (name, files) in enumerate(plan.model.components.items()):
        yield _labeled("" if number else "Files", f"{name}: {files.origin} ({_size(plan, name)})")
    boundary, second = plan.model.variant.sampling.boundary, plan.model.facts.second_denoiser
    if boundary is not None and second not in plan.model.components:
        yield _labeled("", "one of two transformers, which draws all steps; without `--only`, each draws its own")
    for number, line in enumerate(_lora_lines(generation)):
        yield _labeled("" if number else "LoRA", line)
    if len(generation.plans) > 1:
        yield _labeled("", f"{pluralize(len(generation.plans), 'model')}, one for each column of the grid")
    missing = [problem for problem in generation.missing if isinstance(problem, MissingFiles)]
    if missing:
        yield _labeled("Missing", f"model files, {format_bytes(download_bytes(plan))} to download")
    yield _labeled("Draws", _what(generation, job))
    if job.negative_prompt.strip():  # that of Qwen-Image is a space
        yield _labeled("", f"negative prompt: {truncate(job.negative_prompt, SHOWN)}")
    for line in _prompt_lines(generation):
        yield _labeled("", line)
    for number, line in enumerate(_memory_lines(generation)):
        yield _labeled("" if number else "Memory", line)
    where = f"`{generation.out}`"
    yield _labeled("Output", f"{where}, and `{generation.sheet.path.name}` there" if generation.sheet else where)


def _labeled(label: str, text: str) -> str:
    return f"{label:<9} {text}"


def _size(plan: GenerationPlan, component: str) -> str:
    if component not in plan.model.published:
        stored = plan.model.components[component].storage.partition("/")[0]
        return format_bytes(file_bytes(plan, component)) + ("" if stored == "plain" else f", {stored} weights")
    size = file_bytes(plan, component)
    return f"missing, {format_bytes(size)} as published" if size else "missing, size unknown"


def _lora_lines(generation: Generation) -> Iterator[str]:
    """The LoRA files, each with the weights that it has in different images."""
    weights: dict[tuple[str, str], dict[float, None]] = {}
    facts: dict[tuple[str, str], str] = {}
    for applied in (one for plan in generation.plans for job in plan.jobs for one in job.adapters):
        key = str(applied.lora.path), applied.component
        weights.setdefault(key, {})[applied.weight] = None
        ranks = applied.lora.stored_ranks
        modules = pluralize(len(applied.lora.modules), "module")
        facts[key] = f"{modules} of {applied.component}, rank {', '.join(map(str, ranks))}" if ranks else modules
    for key, found in weights.items():
        yield f"{key[0]}: {', '.join(f'{weight:g}' for weight in found)} ({facts[key]})"


def _what(generation: Generation, job: GenerationJob) -> str:
    noun = "clip" if job.num_frames > 1 else "image"
    frames = f" x {job.num_frames} frames" if job.num_frames > 1 else ""
    seeds = [job.seed for plan in generation.plans for job in plan.jobs]
    seed = f"seed {seeds[0]}" if len(set(seeds)) == 1 else f"seeds {min(seeds)} to {max(seeds)}"
    guidance = f", guidance {job.guidance:g}" if job.guidance is not None else ""
    scale = f"CFG scale {job.cfg_scale:g}" if job.cfg_scale != 1 else "no classifier-free guidance"
    size = f"{job.height} x {job.width}{frames}"
    return f"{pluralize(generation.count, noun)} of {size}, {pluralize(job.steps, 'step')}, {scale}{guidance}, {seed}"


def _prompt_lines(generation: Generation) -> Iterator[str]:
    """The first image of each prompt, with its seed and extra inputs."""
    firsts: dict[int, tuple[str, GenerationJob]] = {}
    for plan, images in zip(generation.plans, generation.images, strict=True):
        for job, image in zip(plan.jobs, images, strict=True):
            firsts.setdefault(image.row, (image.path.name, job))
    for name, job in list(firsts.values())[:LISTED]:
        shown = "".join(f", {key} {', '.join(map(str, paths))}" for key, paths in job.images.items())
        yield f"{name}  {truncate(' '.join(job.prompt.split()), SHOWN) or 'an empty prompt'}{shown}"
    if len(firsts) > LISTED:
        yield f"and {pluralize(len(firsts) - LISTED, 'more prompt')}"


def _memory_lines(generation: Generation) -> Iterator[str]:
    """The weights of the largest moment, whether they fit, and if they do not, the flag with which they do."""
    moments = weights_at_once(generation)
    largest = max(moments, key=lambda name: moments[name])
    device, _ = device_and_precision(generation.parameters, generation.plans[0].machine)
    where = "" if device == "cpu" else " on the GPU"
    text = f"{format_memory(moments[largest])} of weights{where} at most ({largest}); activations, not counted, come on top"
    asked = generation.parameters.gpu_memory
    if not asked:
        yield text
        return
    limit = memory_bytes(asked)
    verdict = "fit" if weights_fit(generation) else "do not fit"
    yield f"{text}; the weights {verdict} in {format_memory(limit)} ({asked})"
    if weights_fit(generation):
        return
    if option := find_storage(generation, limit):
        yield f"to make them fit, with {format_memory(option.peak)} at most, pass `{option.flag}`"
    elif sizes_are_known(generation):
        yield "they do not fit in 8-bit floats (`--fp8_models`) either"
    else:
        yield "what 8-bit floats (`--fp8_models`) would save can be told once all files are there"


def image_facts(generation: Generation) -> dict[str, Any]:
    """The images of a command, for JSON."""
    images = [
        {
            "path": str(image.path),
            **job.facts,
            "images": {name: [str(path) for path in paths] for name, paths in job.images.items()},
            "loras": [{"file": str(one.lora.path), "weight": one.weight} for one in job.adapters],
        }
        for plan, planned in zip(generation.plans, generation.images, strict=True)
        for job, image in zip(plan.jobs, planned, strict=True)
    ]
    return {
        "model": generation.plans[0].model.variant.title,
        "images": sorted(images, key=lambda one: str(one["path"])),
        "grid": str(generation.sheet.path) if generation.sheet else None,
    }

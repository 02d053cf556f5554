"""Whether a run fits the memory of a GPU, and the smallest change of parameters with which it does. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from shlex import quote

from diffsynth_core.planning.memory import device_memory
from diffsynth_core.planning.memory_config import MemoryConfig
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.planning.sizes import shrink
from diffsynth_core.progress import pluralize

SHARES = (0.75, 0.5, 0.25)
"""Of the area of images, and of the length of clips, that are tried."""


TIGHT_BYTES = 2**30
"""A run that leaves less than this of the GPU for what is not counted may fail all the same."""


@dataclass(frozen=True)
class MemoryOption:
    """Something to do otherwise: in words, by the flags that do it, quoted for a shell, and as the config they make."""

    words: str
    flag: str
    config: MemoryConfig


@dataclass(frozen=True)
class Candidate:
    """Changes together, and the memory of the device at its fullest with them, in bytes."""

    changes: tuple[MemoryOption, ...]
    peak: int


@dataclass(frozen=True)
class MemoryFit:
    """Whether a run fits in `limit` bytes, and what was tried, the last of which fits if `fits`."""

    limit: int
    peak: int
    tried: tuple[Candidate, ...]

    @property
    def fits_unchanged(self) -> bool:
        """Whether the run fits as it is."""
        return self.peak <= self.limit

    @property
    def fits(self) -> bool:
        """As it is, or with the last change that was tried."""
        return self.fits_unchanged or bool(self.tried and self.tried[-1].peak <= self.limit)

    @property
    def left(self) -> int:
        """Bytes of the GPU that are left, as it is or with the last change that was tried."""
        return self.limit - (self.peak if self.fits_unchanged else self.tried[-1].peak)

    @property
    def is_tight(self) -> bool:
        """Whether it fits, as it is or changed, with little left."""
        return self.fits and self.left < TIGHT_BYTES


def find_fit(plan: RunPlan, config: MemoryConfig, limit: int) -> MemoryFit:
    """Each change alone, those first that cost the least, then one upon the other, until the run fits.

    Args:
        limit: memory of the GPU in bytes.
    """
    peak = device_memory(plan, config).peak
    tried: list[Candidate] = []
    if peak <= limit:
        return MemoryFit(limit, peak, ())
    changes = list(_options(plan, config))
    for change in changes:
        reached = device_memory(plan, change.config).peak
        tried.append(Candidate((change,), reached))
        if reached <= limit:
            return MemoryFit(limit, peak, tuple(tried))
    together, lowest = config, peak
    made: tuple[MemoryOption, ...] = ()
    for change in changes:
        combined = _combined(together, config, change.config)
        reached = device_memory(plan, combined).peak
        if reached >= lowest:
            continue
        together, made, lowest = combined, _with_option(made, change), reached
        if len(made) > 1:
            tried.append(Candidate(made, reached))
        if reached <= limit:
            break
    return MemoryFit(limit, peak, tuple(tried))


def _options(plan: RunPlan, config: MemoryConfig) -> Iterator[MemoryOption]:
    """What may be done otherwise, that first which costs the least."""
    sizes, rank = config.sizes, config.rank
    if not config.recompute:
        recomputed = replace(config, recompute=True)
        yield MemoryOption("recompute activations", "--use_gradient_checkpointing", recomputed)
    if not config.offload:
        waiting = replace(config, recompute=True, offload=True)
        words = "recompute activations, offload block inputs to host memory"
        yield MemoryOption(words, "--use_gradient_checkpointing_offload", waiting)
    if sizes.batch > 1:
        yield MemoryOption("batch size 1", "--batch_size 1", replace(config, sizes=replace(sizes, batch=1)))
    for name in _rounded(plan):
        if config.storage[name] != "float8":
            kept = replace(config, storage={**config.storage, name: "float8"})
            entries = quote(",".join((*plan.parameters.fp8_models, _entry(plan, name))))
            yield MemoryOption(f"{name} in 8-bit floats", f"--fp8_models {entries}", kept)
    for lower in (rank // 2, rank // 4) if plan.training.lora_component else ():
        if lower:
            yield MemoryOption(f"rank {lower}", f"--lora_rank {lower}", replace(config, rank=lower))
    yield from _smaller(plan, config)


def _rounded(plan: RunPlan) -> list[str]:
    """Components whose weights may be kept in 8-bit floats: those of which no weight trains without LoRA."""
    changing = {*plan.training.full, *plan.training.parts}
    return [name for name in plan.model.components if name not in changing and plan.model.shapes.get(name)]


def _entry(plan: RunPlan, component: str) -> str:
    """What the model parameters call the files of a component."""
    return plan.model.components[component].origin.partition(", ")[0]


def _smaller(plan: RunPlan, config: MemoryConfig) -> Iterator[MemoryOption]:
    """Shorter clips, then smaller images."""
    parameters, target, sizes = plan.parameters, plan.model.variant.target, config.sizes
    longest = sizes.images[0][0]
    for share in SHARES if longest > 1 else ():
        frames = int(longest * share) // target.frame_step * target.frame_step + 1
        shorter = tuple((min(frames, length), height, width) for length, height, width in sizes.images)
        fewer = replace(config, sizes=replace(sizes, images=shorter))
        yield MemoryOption(pluralize(frames, "frame"), f"--num_frames {frames}", fewer)
    for share in SHARES:
        smaller = shrink(sizes, share, target.size_factor)
        _, height, width = smaller.images[0]
        fixed = parameters.height and parameters.width
        flag = f"--height {height} --width {width}" if fixed else f"--max_pixels {int(sizes.area * share)}"
        yield MemoryOption(f"at most {width} x {height}", flag, replace(config, sizes=smaller))


def _with_option(made: tuple[MemoryOption, ...], change: MemoryOption) -> tuple[MemoryOption, ...]:
    """Changes and one more, which takes the place of an earlier one of the same parameter.

    Several components are named in one `fp8_models`.
    """
    parameter = change.flag.split()[0]
    same = [earlier for earlier in made if parameter.startswith(earlier.flag.split()[0])]
    others = tuple(earlier for earlier in made if earlier not in same)
    if parameter == "--fp8_models" and same:
        words = f"{same[0].words}, {change.words}"
        change = replace(change, words=words, flag=f"{same[0].flag},{change.flag.partition(' ')[2]}")
    return (*others, change)


def _combined(together: MemoryConfig, before: MemoryConfig, changed: MemoryConfig) -> MemoryConfig:
    """What was changed already, and what a single change made of the config before."""
    return replace(
        together,
        recompute=together.recompute or changed.recompute,
        offload=together.offload or changed.offload,
        rank=min(together.rank, changed.rank),
        storage={**together.storage, **dict(changed.storage.items() - before.storage.items())},
        sizes=together.sizes
        if changed.sizes == before.sizes
        else replace(
            changed.sizes,
            batch=min(together.sizes.batch, changed.sizes.batch),
            images=tuple(map(_least, together.sizes.images, changed.sizes.images)),
        ),
    )


def _least(one: tuple[int, int, int], other: tuple[int, int, int]) -> tuple[int, int, int]:
    """The fewer frames and the smaller sides of both."""
    frames, height, width = map(min, one, other)
    return frames, height, width

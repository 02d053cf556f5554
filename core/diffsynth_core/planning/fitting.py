"""Whether a run fits the memory of a GPU, and the smallest change of parameters with which it does. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from diffsynth_core.planning.memory import Choice, device_memory
from diffsynth_core.planning.plan import Plan
from diffsynth_core.planning.sizes import shrink

SHARES = (0.75, 0.5, 0.25)
"""Of the area of pictures, and of the length of clips, that are tried."""


@dataclass(frozen=True)
class Change:
    """Parameters to give otherwise, as flags, and the memory of the device at its fullest with them, in bytes."""

    flags: tuple[str, ...]
    peak: int


@dataclass(frozen=True)
class Fit:
    """Whether a run fits in `limit` bytes, and what was tried, the last of which fits if `fits`."""

    limit: int
    peak: int
    tried: tuple[Change, ...]

    @property
    def as_it_is(self) -> bool:
        return self.peak <= self.limit

    @property
    def fits(self) -> bool:
        """As it is, or with the last change that was tried."""
        return self.as_it_is or bool(self.tried and self.tried[-1].peak <= self.limit)


def find_fit(plan: Plan, choice: Choice, limit: int) -> Fit:
    """Each change alone, those first that cost the least, then one upon the other, until the run fits.

    Args:
        limit: memory of the GPU in bytes.
    """
    peak = device_memory(plan, choice).peak
    tried: list[Change] = []
    if peak <= limit:
        return Fit(limit, peak, ())
    steps = list(_changes(plan, choice))
    for flag, changed in steps:
        tried.append(Change((flag,), device_memory(plan, changed).peak))
        if tried[-1].peak <= limit:
            return Fit(limit, peak, tuple(tried))
    together, lowest = choice, peak
    flags: tuple[str, ...] = ()
    for flag, changed in steps:
        combined = _combine(together, choice, changed)
        reached = device_memory(plan, combined).peak
        if reached >= lowest:
            continue
        together, flags, lowest = combined, _with_flag(flags, flag), reached
        if len(flags) > 1:
            tried.append(Change(flags, reached))
        if reached <= limit:
            break
    return Fit(limit, peak, tuple(tried))


def _changes(plan: Plan, choice: Choice) -> Iterator[tuple[str, Choice]]:
    """(flag, what it makes of the choice), those first that cost the least."""
    sizes = choice.sizes
    if not choice.recompute:
        yield "--use_gradient_checkpointing", replace(choice, recompute=True)
    if not choice.offload:
        yield "--use_gradient_checkpointing_offload", replace(choice, recompute=True, offload=True)
    if sizes.batch > 1:
        yield "--batch_size 1", replace(choice, sizes=replace(sizes, batch=1))
    for name in _rounded(plan):
        if name not in choice.float8:
            entries = _fp8_entries(plan, name)
            yield f"--fp8_models {entries}", replace(choice, float8=choice.float8 | {name})
    yield from _smaller(plan, choice)


def _rounded(plan: Plan) -> list[str]:
    """Components whose weights may be kept in 8-bit floats: those of which no weight trains without LoRA."""
    changing = {*plan.training.full, *plan.training.parts}
    return [name for name in plan.components if name not in changing and plan.shapes.get(name)]


def _fp8_entries(plan: Plan, component: str) -> str:
    """What `fp8_models` is to name."""
    named = plan.components[component].origin.partition(", read from")[0]
    return ",".join((*plan.parameters.fp8_models, named))


def _smaller(plan: Plan, choice: Choice) -> Iterator[tuple[str, Choice]]:
    """Shorter clips, then smaller pictures."""
    parameters, medium, sizes = plan.parameters, plan.variant.medium, choice.sizes
    longest = sizes.pictures[0][0]
    for share in SHARES if longest > 1 else ():
        frames = int(longest * share) // medium.frame_step * medium.frame_step + 1
        shorter = tuple((min(frames, length), height, width) for length, height, width in sizes.pictures)
        yield f"--num_frames {frames}", replace(choice, sizes=replace(sizes, pictures=shorter))
    for share in SHARES:
        smaller = shrink(sizes, share, medium.size_factor)
        _, height, width = smaller.pictures[0]
        fixed = parameters.height and parameters.width
        flag = f"--height {height} --width {width}" if fixed else f"--max_pixels {int(sizes.area * share)}"
        yield flag, replace(choice, sizes=smaller)


def _with_flag(flags: tuple[str, ...], flag: str) -> tuple[str, ...]:
    """Flags and one more, which takes the place of an earlier one of its name."""
    name = flag.split()[0]
    return (*(earlier for earlier in flags if not name.startswith(earlier.split()[0])), flag)


def _combine(together: Choice, before: Choice, changed: Choice) -> Choice:
    """What was changed already, and what a single change made of the choice before."""
    return replace(
        together,
        recompute=together.recompute or changed.recompute,
        offload=together.offload or changed.offload,
        float8=together.float8 | changed.float8,
        sizes=together.sizes
        if changed.sizes == before.sizes
        else replace(
            changed.sizes,
            batch=min(together.sizes.batch, changed.sizes.batch),
            pictures=tuple(map(_least, together.sizes.pictures, changed.sizes.pictures)),
        ),
    )


def _least(one: tuple[int, int, int], other: tuple[int, int, int]) -> tuple[int, int, int]:
    """The fewer frames and the smaller sides of both."""
    frames, height, width = map(min, one, other)
    return frames, height, width

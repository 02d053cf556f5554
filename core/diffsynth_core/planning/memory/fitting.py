"""Whether a run fits the memory of a GPU, and the cheapest changes of parameters with which it does. No torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from diffsynth_core.models.encoded_sizes import EncodedSize
from diffsynth_core.planning.machine.context_parallel import can_divide, context_parallel_problems
from diffsynth_core.planning.machine.engines import REPLICATED, EngineChoice, exclusions
from diffsynth_core.planning.memory.estimate import DeviceMemory, device_memory, host_memory, training_memory
from diffsynth_core.planning.memory.fit_options import (
    MemoryOption,
    ParameterChange,
    memory_options,
    parameter_changes,
)
from diffsynth_core.planning.memory.memory_config import MemoryConfig
from diffsynth_core.planning.plan import Machine, RunPlan

TIGHT_BYTES = 2**30
"""A run that leaves less than this of the GPU for what is not counted may fail all the same."""
LEAST_SAVED = 0.05
"""Share of a step's memory below which a change is not worth naming alone."""
TRIED_DEGREES = 4
"""Degrees of an option that are tried while a set that fits is sought; the least that is enough is found at the end."""

NOTHING_ENCODED = EncodedSize()


@dataclass(frozen=True)
class Candidate:
    """Changes together, and the memory that the run takes with them, in bytes: of the device at its fullest, and of
    the host."""

    changes: tuple[ParameterChange, ...]
    peak: int
    host: int = 0

    @property
    def words(self) -> str:
        """What is done otherwise."""
        return ", ".join(dict.fromkeys(change.words for change in self.changes))


@dataclass(frozen=True)
class MemoryFit:
    """Whether a run fits in `limit` bytes, and what was tried, the last of which fits if `fits`.

    Attributes:
        tried: sets of changes, each of which takes less than the one before; the last is the one to make.
    """

    limit: int
    peak: int
    tried: tuple[Candidate, ...]
    host_limit: int | None = None

    @property
    def fits_unchanged(self) -> bool:
        """Whether the run fits as it is."""
        return self.peak <= self.limit

    @property
    def fits(self) -> bool:
        """As it is, or with the last change that was tried."""
        return self.fits_unchanged or bool(self.changes)

    @property
    def changes(self) -> tuple[ParameterChange, ...]:
        """Those that make it fit, or leave more room if it fits as it is."""
        last = self.tried[-1] if self.tried else None
        enough = last and last.peak <= self.limit and (self.host_limit is None or last.host <= self.host_limit)
        return last.changes if last and enough else ()

    @property
    def left(self) -> int:
        """Bytes of the GPU that are left, as it is or with the last change that was tried."""
        return self.limit - (self.peak if self.fits_unchanged else self.tried[-1].peak)

    @property
    def is_tight(self) -> bool:
        """Whether it fits, as it is or changed, with little left."""
        return self.fits and self.left < TIGHT_BYTES


Degrees = tuple[int, ...]
"""Of each option the degree to which it is used; 0: not at all."""
Excess = Callable[[Degrees], int]
"""Bytes above what there is with options used to these degrees, summed over the stages of the run and the host."""


class FitSearch:
    """Searches changes with which a run fits; remembers the memory of what it has tried, for several limits.

    Args:
        encoded: of all samples.
        options: in the order of what they cost; None: all.
    """

    def __init__(
        self,
        plan: RunPlan,
        config: MemoryConfig,
        encoded: EncodedSize = NOTHING_ENCODED,
        options: Sequence[MemoryOption] | None = None,
    ) -> None:
        self._plan, self._config, self._encoded = plan, config, encoded
        self._options = memory_options(plan, config) if options is None else options
        self._measured: dict[Degrees, tuple[DeviceMemory, int]] = {}

    def fit(self, limit: int, host_limit: int | None = None) -> MemoryFit:
        """Return the changes with which the run fits and leaves `TIGHT_BYTES` of the GPU, or else the most it can.

        Options are added in the order of what they cost, until the run fits. Then each is taken back as far as the
        others allow, beginning with what costs the most, so that no change is left that is not needed.

        Args:
            limit: memory of the GPU in bytes.
            host_limit: memory of the host in bytes; None: as much as is asked for.
        """

        def excess(degrees: Degrees) -> int:
            memory, host = self._measure(degrees)
            totals = [stage.total for stage in memory.stages]  # an option may help a stage that is not the fullest
            above = sum(max(0, total - (limit - TIGHT_BYTES)) for total in totals)
            return above + (0 if host_limit is None else max(0, host - host_limit))

        found = list(_lowering(self._options, excess))
        if found and (least := _minimal(found[-1], excess)) != found[-1]:
            found.append(least)
        unchanged, _ = self._measure((0,) * len(self._options))
        return MemoryFit(limit, unchanged.peak, tuple(map(self._candidate, found)), host_limit)

    def _candidate(self, degrees: Degrees) -> Candidate:
        memory, host = self._measure(degrees)
        return Candidate(parameter_changes(self._plan, self._changed(degrees), self._config), memory.peak, host)

    def _measure(self, degrees: Degrees) -> tuple[DeviceMemory, int]:
        """Return the memory of the device and of the host."""
        if degrees not in self._measured:
            changed = self._changed(degrees)
            memory = device_memory(self._plan, changed)
            host = sum(host_memory(self._plan, changed, memory, self._encoded).values())
            self._measured[degrees] = memory, host
        return self._measured[degrees]

    def _changed(self, degrees: Degrees) -> MemoryConfig:
        config = self._config
        for option, degree in zip(self._options, degrees, strict=True):
            config = option.degrees[degree - 1](config) if degree else config
        return config


def find_fit(
    plan: RunPlan,
    config: MemoryConfig,
    limit: int,
    host_limit: int | None = None,
    encoded: EncodedSize = NOTHING_ENCODED,
    options: Sequence[MemoryOption] | None = None,
) -> MemoryFit:
    """Find the changes with which a run fits; see `FitSearch`."""
    return FitSearch(plan, config, encoded, options).fit(limit, host_limit)


@dataclass(frozen=True)
class EngineFit:
    """Whether a run fits in each of its processes with an engine, and what it takes there, in bytes.

    Attributes:
        context_parallel: how many processes compute a sample together, if that is not as in the run.
    """

    configuration: str
    peak: int
    fits: bool
    context_parallel: int | None = None

    @property
    def flags(self) -> str:
        """The flags that ask for it."""
        together = f" --context_parallel {self.context_parallel}" if self.context_parallel else ""
        return f"--accelerate_config {self.configuration}{together}"


CONFIGURATIONS: Mapping[str, EngineChoice] = {
    "ddp": REPLICATED,
    "fsdp2": EngineChoice(name="fsdp2"),
    "fsdp2offload": EngineChoice(name="fsdp2", offload_optimizer=True, offload_weights=True),
}
"""Presets of accelerate configurations, the fastest first: DDP sends gradients alone, FSDP2 the weights as well, and
with offload copies them from the host besides. Those that need another package are left out."""


def engine_fits(
    plan: RunPlan, config: MemoryConfig, limit: int, host_limit: int, encoded: EncodedSize = NOTHING_ENCODED
) -> Iterator[EngineFit]:
    """Yield what a run of several processes takes in each of them with the engines that it can use, otherwise
    unchanged, the fastest first; and if none fits, the first that does with processes that compute a sample together.
    One fits if it leaves `TIGHT_BYTES` of the GPU.

    Args:
        limit: memory of each GPU in bytes.
        host_limit: memory of the host for each process in bytes.
    """

    def fits_with(machine: Machine) -> Iterator[EngineFit]:
        for name, engine in CONFIGURATIONS.items():
            if list(exclusions(plan.parameters, config.optimizer, config.precision, engine)):
                continue
            with_engine = replace(plan, machine=replace(machine, engine=engine))
            memory = device_memory(with_engine, config)
            host = sum(host_memory(with_engine, config, memory, encoded).values())
            yield EngineFit(name, memory.peak, memory.peak <= limit - TIGHT_BYTES and host <= host_limit)

    unchanged = list(fits_with(plan.machine))
    yield from unchanged
    if any(fit.fits for fit in unchanged):
        return
    for number in _more_together(plan, config):
        for fit in fits_with(replace(plan.machine, context_parallel=number)):
            if fit.fits:
                yield replace(fit, context_parallel=number)
                return


def _more_together(plan: RunPlan, config: MemoryConfig) -> Iterator[int]:
    """Yield how many processes could compute a sample together, beyond as many as do."""
    shapes = {sample.target.shape for sample in plan.data.samples.samples} or {config.sizes.images[0]}
    shapes |= {(job.num_frames, job.height, job.width) for job in plan.previews}
    if not can_divide(plan.model):
        return
    for number in range(plan.machine.context_parallel + 1, plan.machine.world_size + 1):
        asked = plan.parameters.model_copy(update={"context_parallel": number})
        trained, processes = plan.training.components, plan.machine.world_size
        if not list(context_parallel_problems(asked, plan.model, trained, processes, shapes)):
            yield number


def alternatives(plan: RunPlan, config: MemoryConfig) -> Iterator[Candidate]:
    """Yield changes each of which alone lowers the memory of a step by a share worth it, in the order of what they
    cost; `peak` is that of training.
    """
    enough = (1 - LEAST_SAVED) * training_memory(plan, config).total
    for option in memory_options(plan, config):
        changed = option.degrees[-1](config)
        total = training_memory(plan, changed).total
        if total <= enough:
            yield Candidate(parameter_changes(plan, changed, config), total)


def _lowering(options: Sequence[MemoryOption], excess: Excess) -> Iterator[Degrees]:
    """Yield sets of changes, each with less excess than the one before, until there is none or no option lowers it.

    Options of one cost are exhausted before those that cost more, and all are gone through again after an improvement:
    what waits in host memory may find room there only after another option has made it smaller.
    """
    chosen, costs = (0,) * len(options), [option.cost for option in options]
    limits = [
        number for number in range(1, len(options) + 1) if costs[number - 1 : number] != costs[number : number + 1]
    ]
    while limits:
        improved = False
        for number, option in enumerate(options[: limits[0]]):
            if not excess(chosen):
                return
            count = len(option.degrees)
            tried = {max(1, count * part // TRIED_DEGREES) for part in range(1, TRIED_DEGREES + 1)}
            found = [_with_degree(chosen, number, degree) for degree in sorted(tried) if degree > chosen[number]]
            lowest = min([chosen, *found], key=excess)
            if lowest != chosen:
                chosen, improved = lowest, True
                yield chosen
        if not improved:
            limits.pop(0)


def _minimal(chosen: Degrees, excess: Excess) -> Degrees:
    """Return the same changes without those, and to lower degrees than those, that are not needed."""
    enough = excess(chosen)
    for number in reversed(range(len(chosen))):
        low, high = -1, chosen[number]  # the lowest degree that is enough is above `low`, and at most `high`
        while high - low > 1:
            middle = 0 if low < 0 else (low + high) // 2
            if excess(_with_degree(chosen, number, middle)) <= enough:
                high = middle
            else:
                low = middle
        chosen = _with_degree(chosen, number, high)
    return chosen


def _with_degree(degrees: Degrees, number: int, degree: int) -> Degrees:
    return (*degrees[:number], degree, *degrees[number + 1 :])

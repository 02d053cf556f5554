"""What `fit` does: the cheapest changes with which a run fits the memory of a GPU, made before it is planned."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from diffsynth_core.checkpoints.run_folder import read_record
from diffsynth_core.config.gpu_memory import memory_bytes
from diffsynth_core.config.origins import Origin
from diffsynth_core.config.parameters import DEFAULTS, SETTINGS, Parameters, as_plain
from diffsynth_core.config.resolve import Resolved
from diffsynth_core.errors import DiffSynthError, DoesNotFit, FaultsFound, Problem
from diffsynth_core.planning.machine.device import device_bytes, host_bytes
from diffsynth_core.planning.memory.fit_options import FITTED, MemoryOption, memory_options
from diffsynth_core.planning.memory.fitting import Candidate, MemoryFit, find_fit
from diffsynth_core.planning.memory.host_memory import available_bytes
from diffsynth_core.planning.memory.memory_config import memory_config
from diffsynth_core.planning.memory.sizes import find_workload
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import format_memory

ORIGIN = Origin("fit", "`--fit`")
FREE_SHARE = 0.9
"""Of the host memory that is free now, which may be less when the run starts."""
LEAST_HOST_BYTES = 64 * 2**30
"""The least host memory that is assumed."""
HOST_SHARE = 2
"""Host memory that is assumed for each GPU of a machine that is not this one, as a multiple of the GPU's memory."""


def make_it_fit(resolved: Resolved, plan_of: Callable[[Resolved], RunPlan]) -> Resolved:
    """Return the parameters of a run with the cheapest changes that make it fit.

    A run to resume keeps what its numbers depend on.

    Args:
        plan_of: plans a run whose files may be missing, so that nothing is downloaded for one that does not fit.

    Raises:
        FaultsFound: as `plan_of`, or if no changes that leave what is trained as it is are enough.
    """
    if resolved.parameters.blocks_to_swap == "auto":
        what = "`fit` and `blocks_to_swap` `auto` both choose the number of blocks"
        problem = Problem(what, "remove `--blocks_to_swap auto`", wrong_use=True)
        plan_of(resolved.with_problem(problem))  # raises it together with all others
    limit = gpu_bytes(resolved.parameters)
    if limit is None:
        plan_of(resolved.with_problem(_no_gpu(resolved.parameters)))  # raises it together with all others
        return resolved
    recorded = _recorded(resolved)
    now = as_plain(resolved.parameters)
    resolved = resolved.with_values({name: value for name, value in recorded.items() if value != now[name]}, ORIGIN)
    plan = plan_of(resolved)
    run = find_workload(plan)
    config = memory_config(plan, run.largest)
    options = [option for option in memory_options(plan, config) if _is_free(option, resolved, recorded)]
    unchanged = [option for option in options if option.cost != "scope"]
    host = host_limit(plan, limit)
    fit = find_fit(plan, config, limit, host, run.encoded, unchanged)
    if not fit.fits:
        raise FaultsFound([_does_not_fit(fit, find_fit(plan, config, limit, host, run.encoded, options))])
    return resolved.with_values({change.parameter: change.value for change in fit.changes}, ORIGIN)


def gpu_bytes(parameters: Parameters) -> int | None:
    """Return the memory that a run has to fit in: `gpu_memory`, or that of this machine's GPU, if there is one."""
    return memory_bytes(parameters.gpu_memory) if parameters.gpu_memory else device_bytes(parameters)


def host_limit(plan: RunPlan, gpu: int) -> int:
    """Return the host memory for each process of a run: of this machine if its device is here, else what is assumed.

    Args:
        gpu: memory of the GPU.
    """
    if plan.machine.device.partition(":")[0] == "cpu":
        return assumed_host_bytes(gpu)
    # Processes that were launched by another program have to find the same changes, so none asks what is free just now.
    world_size = plan.machine.world_size
    return host_bytes() // world_size if world_size > 1 else int(FREE_SHARE * available_bytes())


def assumed_host_bytes(gpu: int) -> int:
    """Return the host memory that is assumed for each GPU of a machine that is not this one."""
    return max(HOST_SHARE * gpu, LEAST_HOST_BYTES)


def _recorded(resolved: Resolved) -> dict[str, Any]:
    """Return the values that the run to resume was trained with, of parameters that `fit` may set and the user has
    not."""
    if resolved.parameters.resume is None:
        return {}
    record = None
    with suppress(DiffSynthError):  # the plan reports why a record cannot be read
        record = read_record(resolved.parameters.output_path)
    if record is None:
        return {}
    fixed = [name for name in FITTED if SETTINGS[name].changes == "numbers" and not _is_chosen(name, resolved)]
    return {name: record.parameters.get(name, DEFAULTS[name]) for name in fixed}


def _is_chosen(name: str, resolved: Resolved) -> bool:
    """Return whether the user sets a parameter, so that it stays as it is."""
    return resolved.origin(name).kind in ("flag", "config")


def _is_free(option: MemoryOption, resolved: Resolved, recorded: Mapping[str, Any]) -> bool:
    """Return whether an option may be used: the user has not set its parameters, nor the run that is resumed."""
    return not any(_is_chosen(name, resolved) or name in recorded for name in option.parameters)


def _no_gpu(parameters: Parameters) -> Problem:
    what = f"`device` is `{parameters.device}`" if parameters.device else "this machine has no GPU"
    return Problem(
        f"`fit` needs to know the memory that the run has to fit in, but {what}",
        "pass `--gpu_memory`, such as `--gpu_memory 24GB`",
        wrong_use=True,
    )


def _does_not_fit(fit: MemoryFit, smaller: MemoryFit) -> DoesNotFit:
    """Return the problem of a run that does not fit, with how much is missing and what else would help.

    Args:
        smaller: what fits if something else is trained.
    """
    last = fit.tried[-1] if fit.tried else Candidate((), fit.peak)
    missing = format_memory(last.peak - fit.limit)
    what = f"{format_memory(last.peak)}, {missing} more than the {format_memory(fit.limit)} of the GPU"
    if last.peak <= fit.limit and fit.host_limit is not None:
        what = f"{format_memory(last.host)} of host memory, where there are {format_memory(fit.host_limit)}"
    changes = f", with {last.words}" if last.changes else ""
    hint = "use a GPU with more memory"
    if smaller.changes:
        flags = " ".join(change.flag for change in smaller.changes if change.parameter not in FITTED)
        hint = f"train less at once with `{flags}`, or {hint}"
    return DoesNotFit(f"`fit`: the run needs {what}{changes}", hint)

"""Whether what waits in host memory fits in this machine. No torch."""

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil

from diffsynth_core.errors import Problem
from diffsynth_core.planning.memory.estimate import device_memory, host_memory
from diffsynth_core.planning.memory.memory_config import device_and_precision, memory_config
from diffsynth_core.planning.memory.sizes import find_workload
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import format_memory

CONTROL_GROUPS = Path("/sys/fs/cgroup")
"""Limits of the container, as Linux mounts them there."""
LIMITS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Files of control groups, version 2 and 1: limit, usage, details, and what of the usage is given up when needed."""

WAITING = (
    *("blocks_to_swap", "enable_optimizer_cpu_offload"),
    *("use_gradient_checkpointing_offload", "initialize_model_on_cpu"),
)
"""Parameters with which a part of the run waits in host memory."""


def available_bytes(control_groups: Path = CONTROL_GROUPS) -> int:
    """Return the bytes of host memory that a process may still take, of the machine and of its container.

    Args:
        control_groups: where Linux mounts limits of containers.
    """
    available: int = psutil.virtual_memory().available
    for limit, usage, details, reclaimable in LIMITS:
        with suppress(OSError, ValueError):  # another version, or "max": no limit
            allowed = int((control_groups / limit).read_text(encoding="utf-8"))
            used = int((control_groups / usage).read_text(encoding="utf-8"))
            lines = (line.split() for line in (control_groups / details).read_text(encoding="utf-8").splitlines())
            cached = next((int(value) for name, value in lines if name == reclaimable), 0)
            available = min(available, max(0, allowed - used + cached))
    return available


def host_problems(plan: RunPlan, available: int | None = None) -> list[Problem]:
    """Return the problem of a run of which more waits in host memory than there is, which would end it.

    Args:
        available: bytes; None: measured.
    """
    if not plan.task.trains or not any(getattr(plan.parameters, name) for name in WAITING):
        return []
    run, on_cpu = find_workload(plan), plan.machine.device == "cpu"
    config = replace(
        memory_config(plan, run.largest),
        device="cpu" if on_cpu else "cuda",
        precision=plan.machine.mixed_precision,
    )
    memory = device_memory(plan, config)
    parts = host_memory(plan, config, memory, run.encoded)
    if on_cpu:
        parts["all that is on the device, which is the CPU"] = memory.peak
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or plan.machine.world_size)
    needed = processes * sum(parts.values())
    available = available_bytes() if available is None else available
    if needed <= available:
        return []
    each = ", ".join(f"{format_memory(size)} for {name}" for name, size in parts.items())
    several = f"{processes} processes with {format_memory(needed // processes)} each: " if processes > 1 else ""
    what = f"the run needs {format_memory(needed)} of host memory ({several}{each}), but only {format_memory(available)} are available"
    hint = "lower `--blocks_to_swap`, keep weights in fewer bits with `--fp8_models`, or use a machine with more memory"
    return [Problem(what, hint)]


def shortage_here(plan: RunPlan) -> list[Problem]:
    """Return the problem of a run that is planned for a device that this machine has; of others nothing is known."""
    planned_for, _ = device_and_precision(plan.parameters, plan.machine)
    return host_problems(plan) if (plan.machine.device == "cpu") == (planned_for == "cpu") else []

"""Several machines: what they agree on, because none sees the disk of another."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import Reporter

T = TypeVar("T")
SEEN_AFTER_SECONDS = 5.0
"""How long a network file system may take to show a new file to another machine."""


def local_world_size(accelerator: Accelerator) -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))


def of_first(value: T, accelerator: Accelerator) -> T:
    """Return what the first process gives, in all of them."""
    if accelerator.num_processes == 1:
        return value
    values = [value]
    broadcast_object_list(values)
    return values[0]


def with_start_of_first(plan: RunPlan, accelerator: Accelerator) -> RunPlan:
    """Return the plan starting where that of the first process does, whose output folder has the states."""
    return replace(plan, output=replace(plan.output, start=of_first(plan.output.start, accelerator)))


def share_of_samples(plan: RunPlan, accelerator: Accelerator, reporter: Reporter) -> tuple[int, int]:
    """Return which of how many equal shares of the samples this process encodes.

    If the machines share the folder of the cache, all processes fill it together; otherwise those of each machine fill
    their own.
    """
    rank, count, here = accelerator.process_index, accelerator.num_processes, local_world_size(accelerator)
    if here == count or sees_file_of_first(plan.output.cache, accelerator):
        return rank, count
    reporter.info(f"The machines do not share `{plan.output.cache}`: each encodes all samples that it lacks")
    return int(os.environ.get("LOCAL_RANK", "0")), here


def sees_file_of_first(folder: Path, accelerator: Accelerator) -> bool:
    """Return whether every process sees a file that the first one writes into a folder; all return the same."""
    path = folder / of_first(f".seen-by-all-{uuid4().hex}", accelerator)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    accelerator.wait_for_everyone()
    until = time.monotonic() + SEEN_AFTER_SECONDS
    while not (seen := path.exists()) and time.monotonic() < until:
        time.sleep(0.1)
    blind = accelerator.reduce(torch.tensor(float(not seen), device=accelerator.device), "sum")
    if accelerator.is_main_process:
        path.unlink(missing_ok=True)
    return not bool(blind > 0)

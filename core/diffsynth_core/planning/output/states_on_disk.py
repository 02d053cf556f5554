"""Check of the disk space for the states that a run keeps. No torch."""

from pathlib import Path

from diffsynth_core.checkpoints.saved_states import state_folders
from diffsynth_core.errors import Problem
from diffsynth_core.files import free_bytes
from diffsynth_core.planning.memory.disk import checkpoint_bytes, most_states, state_bytes
from diffsynth_core.planning.plan import RunPlan
from diffsynth_core.progress import format_bytes, pluralize


def state_problems(plan: RunPlan, free: int | None = None) -> list[Problem]:
    """Return the problem of states and a checkpoint that do not fit on the disk of the output folder.

    The state of full training has three times the size of the weights in float32, so this is checked before the first
    save.

    Args:
        free: free bytes of the disk; None: measured.
    """
    if not plan.task.trains:
        return []
    folder, keep, state = plan.parameters.output_path, plan.parameters.keep_states, state_bytes(plan)
    available = (free_bytes(folder) if free is None else free) + bytes_of_states(folder)
    needed = _needed(plan, keep)
    if needed <= available:
        return []
    single = _needed(plan, 1)
    way = (
        f"pass `--keep_states 1`, which takes {format_bytes(single)}, or free "
        if keep > 1 and single <= available
        else "free "
    )
    what = (
        f"{pluralize(most_states(plan, keep), 'state')} to resume from ({format_bytes(state)} each, including the one being "
        f"written) and a checkpoint take {format_bytes(needed)} on the disk of `{folder}`, which has {format_bytes(available)} free"
    )
    return [Problem(what, f"{way}some space, or choose another `--output_path`")]


def _needed(plan: RunPlan, keep: int) -> int:
    return most_states(plan, keep) * state_bytes(plan) + checkpoint_bytes(plan)


def bytes_of_states(folder: Path) -> int:
    """Return the bytes of existing states, which new ones replace."""
    return sum(path.stat().st_size for state in state_folders(folder) for path in state.iterdir() if path.is_file())

"""Whether the disk has room for the states that a run keeps. No torch."""

from pathlib import Path

from diffsynth_core.checkpoints.saved_states import state_folders
from diffsynth_core.errors import Problem
from diffsynth_core.files import free_bytes
from diffsynth_core.planning.memory import checkpoint_bytes, most_states, state_bytes
from diffsynth_core.planning.plan import Plan
from diffsynth_core.progress import format_bytes, pluralize


def state_problems(plan: Plan, free: int | None = None) -> list[Problem]:
    """Why the states of a run, and one checkpoint, do not fit the disk of its output folder.

    A state of a full training is three times its weights in float32: better told now than at the first save.

    Args:
        free: bytes on that disk; None: as it is.
    """
    if not plan.task.trains:
        return []
    folder, keep, state = plan.parameters.output_path, plan.parameters.keep_states, state_bytes(plan)
    room = (free_bytes(folder) if free is None else free) + _bytes_of_states(folder)
    needed = _needed(plan, keep)
    if needed <= room:
        return []
    single = _needed(plan, 1)
    way = (
        f"pass `--keep_states 1`, which takes {format_bytes(single)}, or free "
        if keep > 1 and single <= room
        else "free "
    )
    what = (
        f"{pluralize(most_states(plan, keep), 'state')} to resume from ({format_bytes(state)} each, including the one being "
        f"written) and a checkpoint take {format_bytes(needed)} on the disk of `{folder}`, which has {format_bytes(room)} free"
    )
    return [Problem(what, f"{way}some space, or choose another `--output_path`")]


def _needed(plan: Plan, keep: int) -> int:
    return most_states(plan, keep) * state_bytes(plan) + checkpoint_bytes(plan)


def _bytes_of_states(folder: Path) -> int:
    """Of the states that new ones will take the place of."""
    return sum(path.stat().st_size for state in state_folders(folder) for path in state.iterdir() if path.is_file())

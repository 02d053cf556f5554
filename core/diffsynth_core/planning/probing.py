"""What measuring a run, by `probe` or by `profile`, cannot be asked for together with. No torch."""

from collections.abc import Iterator

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.tasks import TASKS
from diffsynth_core.errors import Problem
from diffsynth_core.progress import pluralize

PROFILE_WARM_UP = 2
"""Steps before those that are traced: memory is allocated in the first, and the profiler starts in the second."""


def probe_problems(parameters: Parameters) -> Iterator[Problem]:
    """Yield what contradicts `probe`, which measures steps with the real weights and writes no run."""
    if parameters.probe is None:
        return
    reasons = {
        "resume": "goes on with a run, but `probe` writes none",
        "rehearse": "trains tiny weights, whose speed `probe` need not measure",
        "dry_run": "loads no weights, which `probe` measures",
        "profile": "writes a trace into the folder of the run, but `probe` writes none",
    }
    for name, reason in reasons.items():
        if getattr(parameters, name):
            yield Problem(f"`{name}` {reason}", f"remove `--{name}` or `--probe`", wrong_use=True)
    if not TASKS[parameters.task].trains:
        yield Problem(f"`task` `{parameters.task}` has no steps to `probe`", "remove `--probe`", wrong_use=True)


def profile_problems(parameters: Parameters, steps_left: int) -> Iterator[Problem]:
    """Yield why steps cannot be traced.

    Args:
        steps_left: of the run, from where it starts; 0 if unknown.
    """
    if parameters.profile is None:
        return
    if not TASKS[parameters.task].trains:
        yield Problem(f"`task` `{parameters.task}` has no steps to `profile`", "remove `--profile`", wrong_use=True)
    elif 0 < steps_left < PROFILE_WARM_UP + parameters.profile:
        what = (
            f"`profile` {parameters.profile} needs {PROFILE_WARM_UP + parameters.profile} steps, with "
            f"{PROFILE_WARM_UP} that warm up, but the run has {pluralize(steps_left, 'step')} to take"
        )
        hint = "lower `--profile`, or train longer with `--max_steps` or `--num_epochs`"
        yield Problem(what, hint, wrong_use=True)

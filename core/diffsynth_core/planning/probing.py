"""What a probe cannot be asked for together with. No torch."""

from collections.abc import Iterator

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.tasks import TASKS
from diffsynth_core.errors import Problem


def probe_problems(parameters: Parameters) -> Iterator[Problem]:
    """Yield what contradicts `probe`, which measures steps with the real weights and writes no run."""
    if parameters.probe is None:
        return
    reasons = {
        "resume": "goes on with a run, but `probe` writes none",
        "rehearse": "trains tiny weights, whose speed `probe` need not measure",
        "dry_run": "loads no weights, which `probe` measures",
    }
    for name, reason in reasons.items():
        if getattr(parameters, name):
            yield Problem(f"`{name}` {reason}", f"remove `--{name}` or `--probe`", wrong_use=True)
    if not TASKS[parameters.task].trains:
        yield Problem(f"`task` `{parameters.task}` has no steps to `probe`", "remove `--probe`", wrong_use=True)

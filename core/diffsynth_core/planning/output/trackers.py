"""The trackers that a run sends its metrics to. Imports none of them."""

from collections.abc import Iterator, Mapping
from typing import Any

from diffsynth_core.config.parameters import Parameters, as_plain
from diffsynth_core.errors import Problem, suggest
from diffsynth_core.planning.packages import Package, missing_package

TRACKERS: dict[str, Package | None] = {
    "csv": None,
    "tensorboard": Package("tensorboard", "tensorboard", "tensorboard"),
    "wandb": Package("wandb", "wandb", "wandb"),
    "trackio": Package("trackio", "trackio", "trackio"),
    "swanlab": Package("swanlab", "swanlab", "swanlab"),
}
"""Tracker -> the package that it needs."""
SWITCHES = {
    "enable_csv_log": "csv",
    "enable_tensorboard_log": "tensorboard",
    "enable_wandb_log": "wandb",
    "enable_swanlab_log": "swanlab",
}
"""Parameter of DiffSynth-Studio -> the tracker that it turns on."""


def chosen_trackers(values: Mapping[str, Any]) -> list[str]:
    """Return the trackers that plain parameters turn on, each once; the parameters of older runs have none."""
    switched = (tracker for switch, tracker in SWITCHES.items() if values.get(switch))
    return list(dict.fromkeys([*values.get("log_with", ()), *switched]))


def tracker_problems(parameters: Parameters) -> Iterator[Problem]:
    """Yield unknown trackers (wrong use), and packages that are not installed."""
    for name in chosen_trackers(as_plain(parameters)):
        if name not in TRACKERS:
            near = suggest(name, TRACKERS)
            hint = f"did you mean `{near}`?" if near else None
            what = f"`log_with`: there is no tracker `{name}`; the trackers are {', '.join(TRACKERS)}"
            yield Problem(what, hint, wrong_use=True)
        elif package := TRACKERS[name]:
            yield from missing_package(f"the tracker `{name}`", package)

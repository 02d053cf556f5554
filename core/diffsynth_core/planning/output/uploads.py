"""Whether the checkpoints of a run can be uploaded to the hub that its parameters name. No torch."""

import re
from collections.abc import Iterator

from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.tasks import TASKS
from diffsynth_core.errors import FaultsFound, Problem
from diffsynth_core.hub.client import HubAccessError, Repository, TransientHubError, open_hub

REPOSITORY_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
"""`owner/name`, as both hubs allow it."""


def upload_problems(parameters: Parameters) -> Iterator[Problem]:
    """Yield what is wrong with the parameters of uploads and can be said without asking a hub."""
    name = parameters.push_to_hub
    if name is None:
        given = [other for other in ("hub", "hub_public") if getattr(parameters, other)]
        for other in given:
            hint = f"pass `--push_to_hub owner/name`, or remove `--{other}`"
            yield Problem(f"`{other}` has no effect without `push_to_hub`", hint, wrong_use=True)
    elif not TASKS[parameters.task].trains:
        what = f"`push_to_hub` uploads checkpoints, and `{parameters.task}` writes none"
        yield Problem(what, "remove `--push_to_hub`", wrong_use=True)
    elif not REPOSITORY_NAME.fullmatch(name):
        what = f"`push_to_hub` `{name}` is not the name of a repository"
        yield Problem(what, "pass its owner and name: `--push_to_hub owner/name`", wrong_use=True)


def refused_account(parameters: Parameters) -> list[Problem]:
    """Return why the hub would not let this user upload, as far as it says so without creating anything.

    Asks nothing if `upload_problems` has found something.
    """
    if parameters.push_to_hub is None or any(upload_problems(parameters)):
        return []
    repository = Repository("model", parameters.push_to_hub)
    try:
        open_hub(parameters.hub).check_account(repository)
    except (HubAccessError, FaultsFound) as error:
        return list(error.problems)
    except TransientHubError as error:
        return [_unreachable(error)]
    return []


def create_repository(parameters: Parameters) -> list[Problem]:
    """Create the repository of a run unless it exists; return why it cannot be."""
    if parameters.push_to_hub is None or parameters.probe:
        return []
    try:
        open_hub(parameters.hub).create(Repository("model", parameters.push_to_hub), not parameters.hub_public)
    except HubAccessError as error:
        return list(error.problems)
    except TransientHubError as error:
        return [_unreachable(error)]
    return []


def _unreachable(error: TransientHubError) -> Problem:
    return Problem(f"`push_to_hub`: {error}", "try again later, or remove `--push_to_hub`")

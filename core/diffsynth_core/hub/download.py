"""A download from its list to its last file, one process at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from diffsynth_core.files import default_cache_path
from diffsynth_core.hub.client import Hub, open_hub
from diffsynth_core.hub.download_plan import LOCK, DownloadPlan, compared, plan_download
from diffsynth_core.hub.fetching import fetch
from diffsynth_core.hub.file_requests import FileRequest, absent
from diffsynth_core.hub.identity import IDENTITIES, HashCache
from diffsynth_core.locks import locked
from diffsynth_core.progress import Reporter


def list_download(
    wanted: Sequence[FileRequest], base: Path, source: str | None, reporter: Reporter, verify: bool = False
) -> DownloadPlan:
    """What a download would do; asks the hub, and writes nothing.

    `verify`: read what is here, and compare its hashes too; else only those that are known are compared.
    """
    return _plan(wanted, open_hub(source), base, _identities(), reporter, verify)


def download(
    wanted: Sequence[FileRequest],
    base: Path,
    source: str | None,
    reporter: Reporter,
    tell: Callable[[DownloadPlan], None],
    verify: bool = False,
) -> DownloadPlan:
    """Bring what is wanted below `base`; gives what was to be done.

    `source`: the name of a hub; None: that of the environment, else the usual one. `verify`: as for `list_download`.
    `tell` is given the list before anything is fetched. A list made while another process downloads would be out of
    date: it is made when that one has ended.

    Raises:
        FaultsFound: what the hub does not have or give, before anything is fetched; files that could not be brought.
        DiffSynthError: when the hub cannot be reached, or the disk is full.
    """
    with _alone(base, reporter):
        return _download(wanted, base, source, reporter, tell, verify)


def download_missing(
    wanted: Sequence[FileRequest],
    base: Path,
    waiting: Reporter,
    reporter: Reporter,
    tell: Callable[[DownloadPlan], None],
) -> None:
    """Bring what is wanted when any of it is not on disk; of several processes that ask for the same one does it.

    `waiting` is told of another process that downloads; `reporter` and `tell` are as for `download`, which also says
    what is raised.
    """
    with _alone(base, waiting):
        if absent(wanted, base):
            _download(wanted, base, None, reporter, tell, verify=False)


def _download(
    wanted: Sequence[FileRequest],
    base: Path,
    source: str | None,
    reporter: Reporter,
    tell: Callable[[DownloadPlan], None],
    verify: bool,
) -> DownloadPlan:
    hub, identities = open_hub(source), _identities()
    plan = _plan(wanted, hub, base, identities, reporter, verify)
    tell(plan)
    plan.check_disk()
    if plan.to_fetch:
        fetch(plan, hub, identities, reporter)
    return plan


def _plan(
    wanted: Sequence[FileRequest],
    hub: Hub,
    base: Path,
    identities: HashCache,
    reporter: Reporter,
    verify: bool,
) -> DownloadPlan:
    reporter.info(f"Requesting the file list from {hub.title}")  # a hub that does not answer is asked for half a minute
    plan = plan_download(wanted, hub, base, identities)
    if not verify:
        return plan
    here = (listed.target for listed in plan.files if listed.state == "here")
    identities.read_all(here, reporter, "Hashing files")
    return compared(plan, identities)


def _identities() -> HashCache:
    """The hashes that runs remember too."""
    return HashCache(default_cache_path() / IDENTITIES)


@contextmanager
def _alone(base: Path, reporter: Reporter) -> Iterator[None]:
    """Within it no other process downloads into `base`."""
    with locked(base / LOCK, lambda: reporter.info(f"Waiting for another process that is downloading into `{base}`")):
        yield

"""Downloading: file list, disk space check and transfer, in one process at a time."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from diffsynth_core.errors import DiffSynthError, Interrupted
from diffsynth_core.files import default_cache_path
from diffsynth_core.hub.client import Hub, downloads_disabled, open_hub
from diffsynth_core.hub.download_plan import LOCK, DownloadPlan, compared, plan_download
from diffsynth_core.hub.fetching import fetch
from diffsynth_core.hub.file_requests import FileRequest, absent
from diffsynth_core.hub.identity import IDENTITIES, HashCache
from diffsynth_core.hub.model_files import MissingFiles
from diffsynth_core.locks import locked
from diffsynth_core.progress import Reporter


def list_download(
    requests: Sequence[FileRequest], base: Path, source: str | None, reporter: Reporter, verify: bool = False
) -> DownloadPlan:
    """Plan a download without writing anything; accesses the hub.

    Args:
        verify: hash the files on disk and compare them too; otherwise only hashes that are cached are compared.
    """
    with _resumable():
        return _plan(requests, open_hub(source), base, _identities(), reporter, verify)


def download(
    requests: Sequence[FileRequest],
    base: Path,
    source: str | None,
    reporter: Reporter,
    on_plan: Callable[[DownloadPlan], None],
    verify: bool = False,
) -> DownloadPlan:
    """Download the requested files below `base`, and return the plan.

    Args:
        source: name of the hub; None: chosen by `download_source`.
        on_plan: called with the plan before anything is downloaded.
        verify: see `list_download`.

    Raises:
        FaultsFound: files that the hub lacks or denies, before anything is downloaded; files whose download failed.
        DiffSynthError: if the hub cannot be reached, or the disk is full.
        Interrupted: after Ctrl-C; the downloaded parts are kept.
    """
    with _exclusive(base, reporter):  # planned inside: a plan made while another process downloads would be outdated
        return _download(requests, base, source, reporter, on_plan, verify)


def download_missing(
    requests: Sequence[FileRequest],
    base: Path,
    plan: Callable[[], object],
    waiting: Reporter,
    reporter: Reporter,
    on_plan: Callable[[DownloadPlan], None],
) -> None:
    """Download the requested files that are not on disk, once everything else about a command has been checked.

    Nothing is downloaded for a command that would then be rejected, nor where downloads are disabled. Only one of
    several concurrent processes downloads.

    Args:
        plan: makes the plan of the command; raises all its problems.
        waiting: reporter of a message if another process is downloading.
        reporter, on_plan: see `download`, also for the exceptions.

    Raises:
        FaultsFound: with all problems of the command, missing files included, if there are others.
    """
    if downloads_disabled() or not absent(requests, base):
        return
    try:
        plan()
    except DiffSynthError as error:
        if not all(isinstance(problem, MissingFiles) for problem in error.problems):
            raise
        with _exclusive(base, waiting):
            if absent(requests, base):
                _download(requests, base, None, reporter, on_plan, verify=False)


def _download(
    requests: Sequence[FileRequest],
    base: Path,
    source: str | None,
    reporter: Reporter,
    on_plan: Callable[[DownloadPlan], None],
    verify: bool,
) -> DownloadPlan:
    hub, identities = open_hub(source), _identities()
    plan = _plan(requests, hub, base, identities, reporter, verify)
    on_plan(plan)
    plan.check_disk()
    if plan.to_fetch:
        fetch(plan, hub, identities, reporter)
    return plan


def _plan(
    requests: Sequence[FileRequest],
    hub: Hub,
    base: Path,
    identities: HashCache,
    reporter: Reporter,
    verify: bool,
) -> DownloadPlan:
    reporter.info(f"Requesting the file list from {hub.title}")  # an unreachable hub takes half a minute to time out
    plan = plan_download(requests, hub, base, identities)
    if not verify:
        return plan
    on_disk = (listed.target for listed in plan.files if listed.state == "here")
    identities.read_all(on_disk, reporter, "Hashing files")
    return compared(plan, identities)


def _identities() -> HashCache:
    """Return the cache of file hashes, which training runs use too."""
    return HashCache(default_cache_path() / IDENTITIES)


@contextmanager
def _exclusive(base: Path, reporter: Reporter) -> Iterator[None]:
    """Keep other processes from downloading into `base` during the block."""
    waiting = f"Waiting for another process that is downloading into `{base}`"
    with _resumable(), locked(base / LOCK, lambda: reporter.info(waiting)):
        yield


@contextmanager
def _resumable() -> Iterator[None]:
    """Turn Ctrl-C during the block into an error whose hint is to resume the download."""
    try:
        yield
    except KeyboardInterrupt:
        how = "run the command again to resume it"
        raise Interrupted(signal.SIGINT, "the download was interrupted", how) from None

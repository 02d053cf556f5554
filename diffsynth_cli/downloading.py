"""Downloads in the terminal: the message after Ctrl-C, and the files that `train` fetches before it plans."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffsynth_cli.console import ConsoleReporter
from diffsynth_cli.download_text import plan_lines
from diffsynth_core.config.resolve import Resolved
from diffsynth_core.errors import DiffSynthError, Interrupted
from diffsynth_core.files import model_base_path
from diffsynth_core.hub.client import downloads_disabled
from diffsynth_core.hub.download import download_missing
from diffsynth_core.hub.download_plan import DownloadPlan
from diffsynth_core.hub.file_requests import absent
from diffsynth_core.hub.model_files import MissingFiles
from diffsynth_core.planning.required_files import files_of_stages
from diffsynth_core.progress import Reporter, SilentReporter, Task


@contextmanager
def stopped_in_order() -> Iterator[None]:
    """Turn Ctrl-C in the block into a message that the downloaded parts are kept."""
    try:
        yield
    except KeyboardInterrupt:
        how = "run the command again to resume it"
        raise Interrupted(signal.SIGINT, "the download was interrupted", how) from None


def ensure_downloaded(stages: Sequence[Resolved], reporter: ConsoleReporter, plan: Callable[[Reporter], Any]) -> None:
    """Download the missing files of the stages, once everything else about the command has been checked.

    `plan` plans all stages and raises all problems. Nothing is downloaded for a command that would then be rejected.

    Raises:
        FaultsFound: with all problems, missing files included, if there are others; or if a download fails.
    """
    base = model_base_path()
    wanted = files_of_stages(stages)
    if downloads_disabled() or any(resolved.incomplete for resolved in stages) or not absent(wanted, base):
        return
    try:
        plan(_WithoutWords(reporter))
    except DiffSynthError as error:
        if not all(isinstance(problem, MissingFiles) for problem in error.problems):
            raise
        # The process that downloads reports progress, whichever rank it has.
        messages = ConsoleReporter() if reporter.quiet else reporter

        def show(download: DownloadPlan) -> None:
            for line in plan_lines(download):
                messages.info(line)

        with stopped_in_order():
            download_missing(wanted, base, reporter, messages, show)


class _WithoutWords(SilentReporter):
    """Shows progress but drops messages, for work that is done a second time with them."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    @contextmanager
    def task(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        with self._reporter.task(label, total, unit, done) as task:
            yield task

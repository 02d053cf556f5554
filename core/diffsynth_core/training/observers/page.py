"""Keeps the page of a run up to date while it goes on."""

import math
import time
from collections.abc import Callable
from pathlib import Path

from diffsynth_core.checkpoints.run_folder import PAGE, RECORD, folder_identity
from diffsynth_core.run_page.facts import RunReader
from diffsynth_core.run_page.page import REFRESH_SECONDS, check_is_ours, write_page
from diffsynth_core.run_page.thumbnails import Thumbnails
from diffsynth_core.training.observers.observer import Observer, StepReport, ValidationReport

LEAST_PAUSE = 100
"""From one page to the next at least so many times as long as one took: at most 1 % of the time."""


class PageObserver(Observer):
    """Writes `report.html` from what the run has written so far: at most every few seconds, and at the end.

    A page that cannot be written is reported once, and the run continues.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self._folder, self._identity, self._warn, self._warned = folder, folder_identity(folder), warn, False
        self._reader, self._thumbnails = RunReader(folder), Thumbnails()
        self._after_event = self._after_step = -math.inf
        """When the next page may be written, for what happens seldom and for a step."""
        self._write()

    def on_step(self, report: StepReport) -> None:
        if time.monotonic() >= self._after_step:
            self._write()

    def on_validation(self, report: ValidationReport) -> None:
        self._on_event()

    def on_save(self, path: Path, step: int) -> None:
        self._on_event()

    def on_preview(self, folder: Path, step: int) -> None:
        self._on_event()

    def on_end(self) -> None:
        self._write()

    def _on_event(self) -> None:
        if time.monotonic() >= self._after_event:
            self._write()

    def _write(self) -> None:
        begun = time.monotonic()
        try:
            # Else the folder was removed or renamed, and none is to be made again.
            if folder_identity(self._folder) == self._identity and (self._folder / RECORD).exists():
                check_is_ours(self._folder / PAGE)
                write_page(self._folder / PAGE, self._reader.read(), self._thumbnails, time.time())
        except Exception as error:  # whatever it is, it is not worth a run
            if not self._warned:
                self._warned = True
                reason = str(error) or type(error).__name__
                self._warn(f"`{self._folder / PAGE}` is not up to date: {reason}; the run continues")
        ended = time.monotonic()
        self._after_event = ended + LEAST_PAUSE * (ended - begun)
        self._after_step = max(self._after_event, ended + REFRESH_SECONDS)

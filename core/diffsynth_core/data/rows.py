"""Rows of a dataset for training and for `dataset validate`: parsed cells, and the files that they name. No torch.

Metadata -> cells -> files that can be opened. Each step adds its findings; nothing is raised.
"""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from diffsynth_core.data.captioned_folder import folder_notes
from diffsynth_core.data.columns import check_columns
from diffsynth_core.data.conditions import Columns
from diffsynth_core.data.file_index import Listing, list_files, list_named
from diffsynth_core.data.findings import Finding
from diffsynth_core.data.metadata import Metadata
from diffsynth_core.data.paths import as_on_disk, present_paths, unread_folders
from diffsynth_core.data.records import Record, read_cells
from diffsynth_core.data.sampling import Sampling
from diffsynth_core.errors import Problem

Look = Literal["cells", "named", "all"]
"""What is listed: nothing, the folders of files in rows, or the complete folder."""


@dataclass(frozen=True)
class Rows:
    """The rows of a dataset as far as they could be read.

    Attributes:
        sampling: row -> sampler parameters.
        values: row -> column -> number or text of a condition.
        listing: None if paths are not checked.
        present: paths in rows whose files exist in the dataset; only these are opened.
        findings: about metadata, columns, cells and paths.
    """

    metadata: Metadata
    columns: Columns
    records: tuple[Record, ...]
    sampling: Mapping[int, Sampling] = field(default_factory=dict)
    listing: Listing | None = None
    present: frozenset[str] = frozenset()
    findings: tuple[Finding, ...] = ()
    values: Mapping[int, Mapping[str, float | str]] = field(default_factory=dict)

    @property
    def faulty(self) -> frozenset[int]:
        """Numbers of the rows with an error."""
        return frozenset(one.row for one in self.findings if one.level == "error" and one.row is not None)

    def problems(self) -> list[Problem]:
        """Return the errors as problems of training, by row, with the dataset in each message."""
        errors = sorted((one for one in self.findings if one.level == "error"), key=lambda one: one.row or 0)
        return [Problem(self._message(one), one.hint, code=one.code) for one in errors]

    def _message(self, fault: Finding) -> str:
        metadata = self.metadata
        if fault.code == "EMPTY" and metadata.folder:
            return "; ".join((fault.message, *folder_notes(metadata.folder)))
        if fault.message.startswith("row "):
            return f"`{metadata.origin}` {fault.message}"
        named = metadata.origin in fault.message or f"`{metadata.base}" in fault.message
        return fault.message if named else f"`{metadata.base}`: {fault.message}"


def read_rows(metadata: Metadata, columns: Columns, look: Look, hints: Mapping[str, str] | None = None) -> Rows:
    """Parse the cells of `metadata`, and look up the files in them.

    Args:
        hints: column -> hint if it exists and is not read.
    """
    with without_collecting():
        cells = read_cells(metadata, columns)
        findings = [*metadata.findings, *check_columns(metadata, columns, hints or {}), *cells.findings]
        if look == "cells":
            return Rows(metadata, columns, cells.records, cells.sampling, findings=tuple(findings))
        listing, records = metadata.listing, cells.records
        if listing is None:
            named = [name for record in records for names in record.files.values() for name in names]
            listing = list_files(metadata.base, named) if look == "all" else list_named(metadata.base, named)
            records = as_on_disk(records, listing)
        present, of_paths = present_paths(records, listing)
        findings += [*of_paths, *unread_folders(listing, metadata.captions_in_files)]
        return Rows(metadata, columns, records, cells.sampling, listing, present, tuple(findings), cells.values)


@contextmanager
def without_collecting() -> Iterator[None]:
    """Disable garbage collection in the block.

    Rows are many live objects, and scanning them repeatedly takes a third of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

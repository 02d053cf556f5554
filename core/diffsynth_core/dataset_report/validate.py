"""The checks of a dataset, from PATH to report. No torch.

The way of the data: PATH -> listing, table -> records -> paths that can be opened -> facts of files (in workers) ->
checks -> report. Every step is a function of what came before; printing and the HTML page are elsewhere and read what
`validate` returns: the `Report` (plain values, which JSON shows) and the `DatasetFacts` (all the evidence behind it:
captions, sizes and, with `CheckOptions.thumbnails`, thumbnails). set_checks.py has the training sizes and the crops.

A new check is a function `(DatasetFacts) -> Iterator[Finding]` in the module of its subject, named in `CHECKS`.
"""

import gc
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from diffsynth_core.data.file_index import Listing, list_files, list_named
from diffsynth_core.data.metadata import locate_metadata
from diffsynth_core.dataset_report.caption_checks import check_captions, check_characters, check_lengths, check_repeated
from diffsynth_core.dataset_report.dataset_facts import DatasetFacts
from diffsynth_core.dataset_report.facts import ImageFacts, VideoFacts
from diffsynth_core.dataset_report.findings import CODES, Finding, Report, Summary, count_levels, in_order
from diffsynth_core.dataset_report.image_checks import check_images, check_references, check_same, check_sizes
from diffsynth_core.dataset_report.inspect import Job, Kind, inspect_files
from diffsynth_core.dataset_report.metadata_checks import (
    as_on_disk,
    check_columns,
    check_rows,
    check_sampling,
    check_unused,
    read_records,
)
from diffsynth_core.dataset_report.pair_checks import check_counts, check_identical, check_masks, check_shapes
from diffsynth_core.dataset_report.path_checks import check_folders, check_unreferenced, present_paths
from diffsynth_core.dataset_report.rules import Rules, columns_of
from diffsynth_core.dataset_report.set_checks import check_buckets, check_cache
from diffsynth_core.dataset_report.table import Table, read_table
from diffsynth_core.dataset_report.video_checks import check_rates, check_single_frames, check_videos
from diffsynth_core.progress import Reporter

Depth = Literal["metadata", "named", "paths", "files"]
"""How far a dataset is looked into: rows and captions alone; also whether the files that rows name are there; also what
else is there; also what the files hold."""

Check = Callable[[DatasetFacts], Iterator[Finding]]
ROW_CHECKS: tuple[Check, ...] = (
    check_captions,
    check_characters,
    check_repeated,
    check_lengths,
    check_counts,
    check_sampling,
)
PATH_CHECKS: tuple[Check, ...] = (check_folders, check_unreferenced)
FILE_CHECKS: tuple[Check, ...] = (
    check_images,
    check_sizes,
    check_references,
    check_same,
    check_shapes,
    check_identical,
    check_masks,
    check_videos,
    check_rates,
    check_single_frames,
    check_buckets,
    check_cache,
)
CHECKS: Mapping[Depth, tuple[Check, ...]] = {
    "metadata": ROW_CHECKS,
    "named": ROW_CHECKS,
    "paths": (*ROW_CHECKS, *PATH_CHECKS),
    "files": (*ROW_CHECKS, *PATH_CHECKS, *FILE_CHECKS),
}
"""What is said of a dataset once it has been looked into so far."""


@dataclass(frozen=True)
class CheckOptions:
    """How a dataset is looked into.

    `workers`: processes; 0: as many as there are cores for this one. `thumbnails`: the longer side in pixels of the
    small images that a report shows; None: none are made.
    """

    depth: Depth = "files"
    workers: int = 0
    thumbnails: int | None = None


def validate(
    base: Path, rules: Rules, options: CheckOptions, reporter: Reporter, given: Path | None = None
) -> tuple[Report, DatasetFacts]:
    """Check the dataset in `base`; `given`: its metadata file, where that is not the one that is found there.

    Raises:
        DiffSynthError: when the folder or the file is not there, or the file is no metadata.
    """
    dataset, findings = examine(base, locate_metadata(base, given), rules, options, reporter)
    with _without_collecting():
        for check in CHECKS[options.depth]:
            findings += check(dataset)
    return make_report(dataset, findings, options), dataset


def examine(
    base: Path, metadata: Path | None, rules: Rules, options: CheckOptions, reporter: Reporter
) -> tuple[DatasetFacts, list[Finding]]:
    """A dataset looked into, and what was found on the way there.

    `metadata`: its file, whose paths are relative to `base`; None: captions stand beside the files.
    """
    listing = list_files(base) if metadata is None else Listing(base)
    with _without_collecting():
        table, findings = read_table(base, metadata, rules, listing)
        columns = columns_of(rules, table.columns)
        findings += check_unused(base, metadata)
        findings += check_columns(table, columns, rules.column_hints)
        findings += check_rows(table)
        records, of_cells = read_records(table, columns)
        findings += of_cells
    dataset = DatasetFacts(table, columns, records, rules)
    if options.depth == "metadata":
        return dataset, findings
    if metadata:
        named = [name for record in records for names in record.files.values() for name in names]
        listing = list_named(base, named) if options.depth == "named" else list_files(base, named)
        records = as_on_disk(records, listing)
    dataset = replace(dataset, records=records, listing=listing)
    present, of_paths = present_paths(dataset)
    findings += of_paths
    dataset = replace(dataset, present=present)
    return (_decode(dataset, options, reporter) if options.depth == "files" else dataset), findings


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Put off the search for garbage: rows are many objects and none of them garbage, and going through them again and
    again takes a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _decode(dataset: DatasetFacts, options: CheckOptions, reporter: Reporter) -> DatasetFacts:
    """The same with the facts of all files that can be opened."""
    frames = dataset.rules.media.frames
    job = Job(dataset.table.base, frames.frame_rate if frames else None, options.thumbnails)
    kinds = _kinds(dataset)
    facts = inspect_files(job, kinds, options.workers, dataset.rules.thresholds.file_timeout, reporter)
    images = {name: one for name, one in facts.items() if isinstance(one, ImageFacts)}
    videos = {name: one for name, one in facts.items() if isinstance(one, VideoFacts)}
    return replace(dataset, images=images, videos=videos)


def _kinds(dataset: DatasetFacts) -> dict[str, Kind]:
    """What each file is read as, in the order of the rows: a clip where clips are trained on, unless it is an image."""
    kinds: dict[str, Kind] = {}
    moving = dataset.rules.media.frames is not None or dataset.columns.target == "video"
    for record in dataset.records:
        for column, names in record.files.items():
            for name in names:
                if name in dataset.present:
                    target = moving and column == dataset.columns.target
                    kinds.setdefault(name, "video" if target else "image")
    return kinds


def make_report(dataset: DatasetFacts, findings: list[Finding], options: CheckOptions) -> Report:
    """The report of what was found."""
    ordered = in_order(findings)
    levels = count_levels(ordered)
    counted = Counter(finding.code for finding in ordered)
    summary = Summary(
        origin=dataset.table.origin,
        recipe=dataset.rules.recipe,
        rows=len(dataset.records),
        images=len(dataset.images),
        videos=len(dataset.videos),
        errors=levels["error"],
        warnings=levels["warning"],
        infos=levels["info"],
        codes={code: counted[code] for code in CODES if counted[code]},
        decoded=options.depth == "files",
    )
    return Report(summary, fingerprint_of(dataset), ordered)


def fingerprint_of(dataset: DatasetFacts) -> str:
    """sha256 over columns and rows and, as far as they are known, the content or else the sizes of files."""
    table: Table = dataset.table
    digest = hashlib.sha256(json.dumps(table.columns).encode())
    width = len(table.columns)
    for cells in table.rows.values():
        try:
            row = "\x1f".join(cells.values()) if len(cells) == width else json.dumps(cells)
        except TypeError:  # cells of JSON
            row = json.dumps(cells)
        digest.update(f"{row}\x1e".encode("utf-8", "surrogatepass"))
    known = {name: image.digest for name, image in dataset.images.items()}
    known |= {name: video.digest for name, video in dataset.videos.items()}
    sizes = dataset.listing.files if dataset.listing else {}
    for name in sorted(dataset.present):
        digest.update(f"{name} {known.get(name) or sizes[name]}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()

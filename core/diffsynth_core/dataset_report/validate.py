"""The checks of a dataset, from PATH to report. No torch.

The way of the data: PATH -> rows, read as in training (data/rows.py) -> facts of files (in workers) -> checks ->
report. Every step is a function of what came before; printing and the HTML page are elsewhere and read what `validate`
returns: the `Report` (plain values, which JSON shows) and the `DatasetFacts` (all its evidence: captions,
sizes and, with `CheckOptions.thumbnails`, thumbnails). set_checks.py has the training sizes and the crops.

A new check is a function `(DatasetFacts) -> Iterator[Finding]` in the module of its subject, named in `CHECKS`. What
training refuses by the metadata alone is found where the rows are read.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from diffsynth_core.data.findings import CODES, Finding
from diffsynth_core.data.metadata import read_metadata
from diffsynth_core.data.rows import read_rows, without_collecting
from diffsynth_core.dataset_report.caption_checks import check_captions, check_characters, check_lengths, check_repeated
from diffsynth_core.dataset_report.dataset_facts import DatasetFacts
from diffsynth_core.dataset_report.facts import ImageFacts, VideoFacts
from diffsynth_core.dataset_report.image_checks import check_images, check_references, check_same, check_sizes
from diffsynth_core.dataset_report.inspect import Job, Kind, inspect_files
from diffsynth_core.dataset_report.pair_checks import check_identical, check_masks, check_shapes
from diffsynth_core.dataset_report.report import Report, Summary, count_levels, in_order
from diffsynth_core.dataset_report.row_checks import check_rows, check_unreferenced
from diffsynth_core.dataset_report.rules import Rules
from diffsynth_core.dataset_report.set_checks import check_buckets, check_cache
from diffsynth_core.dataset_report.video_checks import check_rates, check_single_frames, check_videos
from diffsynth_core.progress import Reporter

Depth = Literal["metadata", "paths", "files"]
"""How far a dataset is checked: only rows and captions; also which files exist; also their content."""

Check = Callable[[DatasetFacts], Iterator[Finding]]
"""A check of a dataset."""
ROW_CHECKS: tuple[Check, ...] = (check_rows, check_captions, check_characters, check_repeated, check_lengths)
"""Checks of rows and captions."""
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
"""Checks of examined files."""
CHECKS: Mapping[Depth, tuple[Check, ...]] = {
    "metadata": ROW_CHECKS,
    "paths": (*ROW_CHECKS, check_unreferenced),
    "files": (*ROW_CHECKS, check_unreferenced, *FILE_CHECKS),
}
"""Depth -> checks."""


@dataclass(frozen=True)
class CheckOptions:
    """How a dataset is examined.

    Attributes:
        workers: processes; 0: as many as usable cores.
        thumbnails: longer side in pixels of the report's thumbnails; None: none are created.
    """

    depth: Depth = "files"
    workers: int = 0
    thumbnails: int | None = None


def validate(
    base: Path, rules: Rules, options: CheckOptions, reporter: Reporter, given: Path | None = None
) -> tuple[Report, DatasetFacts]:
    """Check the dataset in `base`; `given`: its metadata file, where that is not the one that is found there.

    Raises:
        DiffSynthError: when the folder or the file does not exist, or the file is no metadata.
    """
    with without_collecting():
        metadata = read_metadata(base, given, rules.text, rules.target, rules.kind)
        columns = rules.columns_among(metadata.columns)
        look: Literal["cells", "all"] = "cells" if options.depth == "metadata" else "all"
        dataset = DatasetFacts(read_rows(metadata, columns, look, rules.column_hints), rules)
    if options.depth == "files":
        dataset = _decode(dataset, options, reporter)
    with without_collecting():
        findings = [*dataset.rows.findings, *(one for check in CHECKS[options.depth] for one in check(dataset))]
    return make_report(dataset, findings, options), dataset


def _decode(dataset: DatasetFacts, options: CheckOptions, reporter: Reporter) -> DatasetFacts:
    """The same with the facts of all files that can be opened."""
    frames = dataset.rules.media.frames
    job = Job(dataset.rows.metadata.base, frames.frame_rate if frames else None, options.thumbnails)
    kinds = _kinds(dataset)
    facts = inspect_files(job, kinds, options.workers, dataset.rules.thresholds.file_timeout, reporter)
    images = {name: one for name, one in facts.items() if isinstance(one, ImageFacts)}
    videos = {name: one for name, one in facts.items() if isinstance(one, VideoFacts)}
    return replace(dataset, images=images, videos=videos)


def _kinds(dataset: DatasetFacts) -> dict[str, Kind]:
    """What each file is read as, in the order of the rows: a clip where clips are read, unless it is an image."""
    kinds: dict[str, Kind] = {}
    columns = dataset.rows.columns
    moving = dataset.rules.media.frames is not None or columns.target == "video"
    clips = columns.clips | {columns.target} if moving else columns.clips
    for record in dataset.rows.records:
        for column, names in record.files.items():
            for name in names:
                if name in dataset.rows.present:
                    kinds.setdefault(name, "video" if column in clips else "image")
    return kinds


def make_report(dataset: DatasetFacts, findings: list[Finding], options: CheckOptions) -> Report:
    """The report of what was found."""
    ordered = in_order(findings)
    levels = count_levels(ordered)
    counted = Counter(finding.code for finding in ordered)
    summary = Summary(
        origin=dataset.rows.metadata.origin,
        recipe=dataset.rules.recipe,
        rows=len(dataset.rows.records),
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
    metadata = dataset.rows.metadata
    digest = hashlib.sha256(json.dumps(metadata.columns).encode())
    width = len(metadata.columns)
    for cells in metadata.rows.values():
        try:
            row = "\x1f".join(cells.values()) if len(cells) == width else json.dumps(cells)
        except TypeError:  # cells of JSON
            row = json.dumps(cells)
        digest.update(f"{row}\x1e".encode("utf-8", "surrogatepass"))
    known = {name: image.digest for name, image in dataset.images.items()}
    known |= {name: video.digest for name, video in dataset.videos.items()}
    sizes = dataset.rows.listing.files if dataset.rows.listing else {}
    for name in sorted(dataset.rows.present):
        digest.update(f"{name} {known.get(name) or sizes[name]}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()

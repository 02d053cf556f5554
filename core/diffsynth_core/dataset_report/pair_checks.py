"""Codes PAIR_… and MASK_…: what belongs together in a row. Pure functions from facts to findings. No torch.

An empty cell of a reference column is PAIR_MISSING, which like PAIR_COUNT is found when cells are read
(data/records.py).
"""

from collections.abc import Iterator

from diffsynth_core.data.findings import Finding, finding
from diffsynth_core.data.media import MediaHeader
from diffsynth_core.data.records import Record
from diffsynth_core.data.samples import SHAPE_SPREAD
from diffsynth_core.dataset_report.dataset_facts import DatasetFacts
from diffsynth_core.dataset_report.facts import FLAT_SPREAD
from diffsynth_core.dataset_report.near_duplicates import are_same
from diffsynth_core.dataset_report.set_checks import header_of


def check_shapes(dataset: DatasetFacts) -> Iterator[Finding]:
    """Yield PAIR_ASPECT: a condition that is to overlay the target has another aspect ratio."""
    columns = dataset.rows.columns
    aligned = dict.fromkeys(one.column for one in columns.conditions if one.aligned and one.media == "image")
    for record in dataset.rows.records:
        target = _header(dataset, record, columns.target)
        for column in aligned if target else ():
            for name in record.files.get(column, ()):
                shown = header_of(dataset, name)
                if target is None or shown is None:
                    continue
                ratio = shown.width * target.height / (shown.height * target.width)
                if not 1 / SHAPE_SPREAD < ratio < SHAPE_SPREAD:
                    what = (
                        f"row {record.row}: `{name}` ({shown.width} x {shown.height}) has another aspect ratio than its "
                        f"{target.width} x {target.height} target"
                    )
                    yield finding("PAIR_ASPECT", what, "crop it to the same aspect ratio", row=record.row, path=name)


def check_identical(dataset: DatasetFacts) -> Iterator[Finding]:
    """Yield PAIR_IDENTICAL: a reference image equals its target."""
    images = dataset.images
    for row, _, files in dataset.rows.records:
        target = images.get(next(iter(files.get(dataset.rows.columns.target, ())), ""))
        if target is None or target.fault:
            continue
        for column in dataset.rows.columns.references:
            for name in files.get(column, ()):
                shown = images.get(name)
                if shown and are_same(dataset.rows.metadata.base, target, shown):
                    what = f"row {row}: column `{column}` names `{name}`, which has the same pixels as its target `{target.path}`"
                    yield finding("PAIR_IDENTICAL", what, "use the image from before the edit", row=row, path=name)


def check_masks(dataset: DatasetFacts) -> Iterator[Finding]:
    """Yield MASK_EMPTY, once per file, and MASK_SIZE, at each row."""
    rows = dataset.first_rows()
    for name in sorted(dataset.of_columns(dataset.rows.columns.masks), key=lambda name: rows[name]):
        mask = dataset.images.get(name)
        if mask and not mask.fault and mask.spread <= FLAT_SPREAD:
            what = f"the mask `{name}` has a single color: it selects nothing, or everything"
            yield finding("MASK_EMPTY", what, "draw the area it should select", row=rows[name], path=name)
    for record in dataset.rows.records:
        target = _header(dataset, record, dataset.rows.columns.target)
        for name in (name for column in dataset.rows.columns.masks for name in record.files.get(column, ())):
            mask_header = header_of(dataset, name)
            if target and mask_header and (mask_header.width, mask_header.height) != (target.width, target.height):
                what = (
                    f"row {record.row}: the mask `{name}` is {mask_header.width} x {mask_header.height} pixels, but its "
                    f"image is {target.width} x {target.height}"
                )
                yield finding("MASK_SIZE", what, "scale it to the same size", row=record.row, path=name)


def _header(dataset: DatasetFacts, record: Record, column: str) -> MediaHeader | None:
    """Return the header of the first file of a column, if known."""
    names = record.files.get(column, ())
    return header_of(dataset, names[0]) if names else None

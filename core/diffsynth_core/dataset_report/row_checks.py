"""ROW_DUPLICATE and FILE_UNREFERENCED: repeated rows, and media that no row names. No torch.

Other findings about rows and paths arise when they are read (data/rows.py).
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from diffsynth_core.data.findings import Finding, finding
from diffsynth_core.data.formats import kind_of_name
from diffsynth_core.dataset_report.dataset_facts import DatasetFacts


def check_rows(dataset: DatasetFacts) -> Iterator[Finding]:
    """Yield ROW_DUPLICATE."""
    keys = {row: _key(cells) for row, cells in dataset.rows.metadata.rows.items()}
    if len(set(keys.values())) == len(keys):
        return
    first: dict[Any, int] = {}
    for row, key in keys.items():
        other = first.setdefault(key, row)
        if other != row:
            yield finding("ROW_DUPLICATE", f"row {row} is a duplicate of row {other}", "remove one of them", row=row)


def _key(cells: Mapping[str, Any]) -> Any:
    try:
        key = tuple(cells.values())
        hash(key)
    except TypeError:
        return json.dumps(cells, sort_keys=True)
    return key


def check_unreferenced(dataset: DatasetFacts) -> Iterator[Finding]:
    """Yield FILE_UNREFERENCED: media that no row names; those of captions are reported by data/folder_rows.py."""
    listing = dataset.rows.listing
    if listing is None or not dataset.rows.records or dataset.rows.metadata.captions_in_files:
        return
    named = frozenset(dataset.first_rows())
    used = named | {listing.links[name] for name in named if name in listing.links}
    for name in sorted(listing.files.keys() - used):
        if kind_of_name(name) in ("image", "clip", "unsupported"):
            yield finding(
                "FILE_UNREFERENCED",
                f"no row uses `{name}`",
                "add a row for it, or move it out of the dataset",
                path=name,
            )

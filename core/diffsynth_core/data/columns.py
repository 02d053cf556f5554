"""Codes COLUMN_MISSING and COLUMN_UNKNOWN: the columns of a dataset against those that are read. No torch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from diffsynth_core.data.conditions import Columns
from diffsynth_core.data.findings import Finding, finding
from diffsynth_core.data.formats import kind_of_name
from diffsynth_core.data.metadata import Metadata
from diffsynth_core.errors import list_names, suggest, truncate

LEAVE_OUT = "remove or rename it"
"""Hint for a column that is not read."""
OTHER_NAMES = {
    "image": ("file_name", "filename", "file", "path", "image_path", "img", "image_file"),
    "video": ("file_name", "filename", "file", "path", "video_path", "media_path"),
    "prompt": ("text", "caption", "captions", "description"),
}
"""Columns -> their names in other programs."""


def check_columns(metadata: Metadata, columns: Columns, hints: Mapping[str, str]) -> Iterator[Finding]:
    """Yield COLUMN_MISSING and COLUMN_UNKNOWN; a column with a similar name is only reported as missing.

    Args:
        hints: column -> hint if it exists and is not read.
    """
    if not metadata.columns and not metadata.rows:
        return
    unknown = columns.unknown(metadata.columns)
    for name in columns.required:
        if name in metadata.columns:
            continue
        near = _near_column(name, unknown)
        if near:
            unknown.remove(near)
        what, hint = _missing_column(metadata, name, columns.required, near)
        yield finding("COLUMN_MISSING", what, hint)
    for name in unknown if not _lacks_header(metadata.columns) else ():
        yield unread_column(metadata.origin, name, columns, hints.get(name, LEAVE_OUT))


def unread_column(origin: str, name: str, columns: Columns, hint: str) -> Finding:
    """Return COLUMN_UNKNOWN of one column."""
    known = list_names(columns.known, 12)
    what = f"`{origin}` has the column `{truncate(name)}`, which is not read; columns that are read: {known}"
    return finding("COLUMN_UNKNOWN", what, hint)


def _missing_column(metadata: Metadata, name: str, required: Sequence[str], near: str | None) -> tuple[str, str]:
    """Return message and hint for a missing column; `near`: one that may be meant."""
    if metadata.captions_in_files:
        listed = ", ".join(f"`{one}`" for one in required)
        what = f"`{metadata.origin}` has no column `{name}`, which requires a metadata file"
        return what, f"write a metadata.csv with the columns {listed}"
    present = list_names([truncate(one) for one in metadata.columns]) or "no columns"
    what = f"`{metadata.origin}` has no column `{name}`; it has {present}"
    if near:
        return what, f"rename `{near}`"
    if _lacks_header(metadata.columns):
        return what, f"add a header line `{','.join(required)}`"
    return what, "add the column"


def _near_column(name: str, others: Iterable[str]) -> str | None:
    """Return the column in `others` that may be meant by a missing one."""
    others = list(others)
    return suggest(name, others) or next((one for one in others if one.lower() in OTHER_NAMES.get(name, ())), None)


def _lacks_header(columns: Sequence[str]) -> bool:
    """Return whether the header looks like a row: it names a file."""
    return any(kind_of_name(name) in ("image", "clip") for name in columns)

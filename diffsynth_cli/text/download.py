"""The file list of a download, as text and as JSON."""

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from diffsynth_core.hub.download_plan import DownloadPlan, ListedFile
from diffsynth_core.progress import format_bytes, pluralize

LINES_SHOWN = 60
"""Maximum number of files listed per repository: more than a model has, fewer than a dataset may have."""
NUMBER_WIDTH = 9
"""Width of sizes."""
STATE_WIDTH = 10
"""Width of states."""


def plan_lines(plan: DownloadPlan) -> Iterator[str]:
    """The files by repository, each with its size and what is on disk; then the totals."""
    for repository, files in groupby(plan.files, key=lambda listed: listed.repository):
        yield f"{repository.name} on {plan.hub}, to `{repository.folder(plan.base)}`"
        listed = list(files)
        yield from map(_line, listed[:LINES_SHOWN])
        if len(listed) > LINES_SHOWN:
            yield f"  … and {len(listed) - LINES_SHOWN} more; `--format json` lists all"
    counts = Counter(listed.state for listed in plan.files)
    states = ", ".join(f"{number} {state}" for state, number in counts.items())
    total = sum(listed.file.size for listed in plan.files)
    yield f"{pluralize(len(plan.files), 'file')}, {format_bytes(total)}: {states}"
    for refusal in plan.refusals:
        yield f"Not checked against the hub: {refusal}"
    yield f"To download: {format_bytes(plan.missing_bytes)}; free at `{plan.base}`: {format_bytes(plan.free_bytes)}"


def result_line(plan: DownloadPlan) -> str:
    """The result of a download."""
    if not plan.to_fetch:
        are = "1 file is" if len(plan.files) == 1 else f"All {len(plan.files)} files are"
        return f"{are} already present below `{plan.base}`"
    return (
        f"Downloaded {pluralize(len(plan.to_fetch), 'file')}, {format_bytes(plan.missing_bytes)}, below `{plan.base}`"
    )


def plan_as_data(plan: DownloadPlan) -> dict[str, Any]:
    """The list as JSON; sizes in bytes."""
    return {
        "hub": plan.hub,
        "base": str(plan.base),
        "free_bytes": plan.free_bytes,
        "missing_bytes": plan.missing_bytes,
        "files": [
            {
                "repository": listed.repository.name,
                "path": listed.file.path,
                "target": str(listed.target),
                "bytes": listed.file.size,
                "bytes_here": listed.bytes_here,
                "state": listed.state,
            }
            for listed in plan.files
        ],
    }


def _line(listed: ListedFile) -> str:
    here = f" ({format_bytes(listed.bytes_here)} here)" if listed.state == "incomplete" else ""
    return f"  {listed.state:<{STATE_WIDTH}} {format_bytes(listed.file.size):>{NUMBER_WIDTH}}  {listed.file.path}{here}"

"""Generation of the reference page of codes and thresholds. No torch."""

from collections.abc import Iterator
from pathlib import Path

from diffsynth_core.config.documents import format_value
from diffsynth_core.data.findings import CODES, SUBJECTS
from diffsynth_core.dataset_report.thresholds import threshold_facts
from diffsynth_core.files import write_text

PAGE = "dataset_checks.md"
"""Name of the page."""


def checks_page() -> str:
    """Return `docs/dataset_checks.md`."""
    lines = [
        "# Dataset checks",
        "",
        "Generated from the declaration by `make docs`; a test fails when this page is stale.",
        "",
        "`diffsynth dataset validate PATH` reports these. An error stops training or would corrupt what the model learns, and",
        "sets exit code 1; a warning is worth a look; an info is a fact. Codes are stable.",
        *_codes(),
        "",
        "## Thresholds",
        "",
        "Each threshold is an option of `diffsynth dataset validate`.",
        "",
        "| option | default | unit | what it does |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `--{name}` | `{format_value(default)}` | {unit} | {text} |"
        for name, (default, unit, text) in threshold_facts().items()
    ]
    return "\n".join(lines) + "\n"


def _codes() -> Iterator[str]:
    """Yield a table for each subject."""
    for subject, title in SUBJECTS.items():
        yield from ("", f"## {title}", "", "| code | level | what it means |", "|---|---|---|")
        for name, code in CODES.items():
            if code.subject == subject:
                exception = f" ({code.exception})" if code.exception else ""
                yield f"| `{name}` | {code.level}{exception} | {code.explanation} |"


def write_documents(folder: Path) -> None:
    """Write the page into the documentation folder of a checkout."""
    write_text(folder / PAGE, checks_page())


if __name__ == "__main__":
    import sys

    write_documents(Path(sys.argv[1]))

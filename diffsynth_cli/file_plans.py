"""Carrying out plans that write weight files, and reporting them as a table or as JSON."""

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffsynth_cli.printing import echo, printable
from diffsynth_core.progress import format_bytes, pluralize

if TYPE_CHECKING:
    from diffsynth_core.conversion.plans import FilePlan


class PlanFormat(StrEnum):
    """Values of `--format`."""

    TABLE = "table"
    JSON = "json"


OutputFormat = Annotated[PlanFormat, typer.Option("--format", help="table: for reading, json: for other programs")]
"""The option `--format`."""
DryRun = Annotated[bool, typer.Option("--dry_run", help="Print what would be written, and exit")]
"""The option `--dry_run`."""
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Overwrite existing files")]
"""The option `--overwrite`."""
FamilyName = Annotated[
    str | None, typer.Option("--family", metavar="NAME", help="Model family, if the file does not reveal it")
]
"""The option `--family`."""
LeaveKeysOut = Annotated[
    bool, typer.Option("--allow_unmatched", help="Skip keys that match no module, such as those of a text encoder")
]
"""The option `--allow_unmatched`."""


def carry_out(plan: "FilePlan", overwrite: bool, dry_run: bool, output_format: PlanFormat) -> None:
    """Write the files of a plan and print a summary to stdout; a dry run only checks paths and disk space.

    Raises:
        DiffSynthError: if something cannot be written; no files are left then.
    """
    from diffsynth_cli.console import ConsoleReporter
    from diffsynth_cli.stopping import handle_sigint
    from diffsynth_core.errors import raise_if_any
    from diffsynth_core.weights.weight_writer import output_problems, write_outputs

    reporter = ConsoleReporter()
    if dry_run:
        raise_if_any(output_problems(plan.outputs, plan.inputs, overwrite))
    else:
        with handle_sigint():
            write_outputs(plan.outputs, plan.inputs, reporter, overwrite)
    for note in plan.notes:
        reporter.info(note)
    echo(_as_json(plan, not dry_run) if output_format is PlanFormat.JSON else files_table(plan))
    if output_format is PlanFormat.TABLE:
        reporter.info(total_line(plan, dry_run))


def total_line(plan: "FilePlan", dry_run: bool) -> str:
    """The number of files and their total size."""
    total = f"{pluralize(len(plan.outputs), 'file')}, {format_bytes(sum(plan.sizes.values()))}"
    return f"{total} would be written (dry run)" if dry_run else f"{total} written"


def files_table(plan: "FilePlan") -> str:
    """One line per file: its path, number of tensors and size."""
    from diffsynth_core.weights.weight_writer import OutputFile

    rows = []
    for output in plan.outputs:
        what = pluralize(len(output.tensors), "tensor") if isinstance(output, OutputFile) else output.kind
        rows.append((printable(str(output.path)), what, format_bytes(plan.sizes[output.path])))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}".rstrip() for row in rows)


def describe_files(plan: "FilePlan") -> list[dict[str, Any]]:
    """The files of a plan, for JSON output."""
    from diffsynth_core.weights.weight_writer import OutputFile

    files = []
    for output in plan.outputs:
        file: dict[str, Any] = {"path": str(output.path), "kind": output.kind, "bytes": plan.sizes[output.path]}
        if isinstance(output, OutputFile):
            file |= {"tensors": len(output.tensors), "metadata": dict(output.metadata)}
        files.append(file)
    return files


def _as_json(plan: "FilePlan", written: bool) -> str:
    content = {
        "written": written,
        "inputs": [str(path) for path in plan.inputs],
        "outputs": describe_files(plan),
        **plan.facts,
        "notes": list(plan.notes),
    }
    return json.dumps(content, indent=2)

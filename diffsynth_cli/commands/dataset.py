"""`diffsynth dataset`: validate."""

import inspect
import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffsynth_cli.options import BOTH_SPELLINGS, setting_option, unknown_options
from diffsynth_cli.printing import echo
from diffsynth_cli.stopping import handle_sigint
from diffsynth_cli.text.wrapping import help_with_examples
from diffsynth_core.config.parameters import SETTINGS
from diffsynth_core.dataset_report.thresholds import Thresholds, threshold_facts
from diffsynth_core.errors import Problem, raise_if_any
from diffsynth_core.progress import format_bytes, pluralize

if TYPE_CHECKING:
    from diffsynth_cli.console import ConsoleReporter
    from diffsynth_core.dataset_report.fix import Fixed
    from diffsynth_core.dataset_report.report import Report


WHOLE_LINES = 1_000_000
"""Columns of a report that goes to a file or a program: no line of it is broken."""
OWN_OPTIONS = ("format", "depth", "workers", "fix", "report")
"""Those that are neither parameters nor thresholds."""


class ReportFormat(StrEnum):
    """Values of `--format`."""

    TABLE = "table"
    JSON = "json"


class Depth(StrEnum):
    """Values of `--depth`."""

    METADATA = "metadata"
    PATHS = "paths"
    FILES = "files"


HELP = """Check a dataset before training: metadata, paths, captions, and every file fully decoded.

PATH is a folder (with a metadata file, or captions next to the files) or a metadata file. Pass the options of the run
(--recipe, --config, --height …) to check the dataset as that run would read it. Exit code 0 without errors, 1 with
errors."""
"""Help text of the command."""
EXAMPLES = (
    "diffsynth dataset validate data/mine",
    "diffsynth dataset validate data/mine --recipe qwen-image-lora",
    "diffsynth dataset validate data/mine --config mine.yaml --max_pixels 262144",
    "diffsynth dataset validate data/mine/metadata.csv --format json",
    "diffsynth dataset validate data/mine --report report.html",
    "diffsynth dataset validate data/mine --fix data/mine/whole.csv",
)
"""Examples in the help text."""


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    datasets = typer.Typer(help="Check datasets.", no_args_is_help=True, rich_markup_mode=None)
    datasets.callback()(_group)
    datasets.command("validate", help=help_with_examples(HELP, *EXAMPLES), context_settings=BOTH_SPELLINGS)(
        _with_options()
    )
    app.add_typer(datasets, name="dataset")


def _group() -> None:
    """Check datasets."""


def validate_dataset(
    context: typer.Context,
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="PATH",
            help="Folder of the dataset, or its metadata file [default: that of the recipe or config file]",
        ),
    ] = None,
    output_format: Annotated[
        ReportFormat, typer.Option("--format", help="table: for reading, json: for other programs")
    ] = ReportFormat.TABLE,
    depth: Annotated[
        Depth,
        typer.Option("--depth", help="metadata: rows and captions; paths: also whether files exist; files: all"),
    ] = Depth.FILES,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Decoding processes; 0: one per core")] = 0,
    fix: Annotated[
        Path | None,
        typer.Option(
            "--fix",
            metavar="OUT.csv",
            help="Write a new metadata file without the rows that have errors; media files stay unchanged",
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="FILE.html", help="Write a page with thumbnails, crops and histograms, for a browser"
        ),
    ] = None,
    **values: Any,
) -> int:
    """Check a dataset and print the report.

    `values`: those of parameters that decide how data is read (None: not given), and the thresholds.
    """
    from diffsynth_cli.console import ConsoleReporter
    from diffsynth_core.config.resolve import resolve_stages
    from diffsynth_core.dataset_report.dataset_of_run import as_flags, choose_stage
    from diffsynth_core.dataset_report.fix import check_target, write_fixed
    from diffsynth_core.dataset_report.recipe_rules import rules_of_run
    from diffsynth_core.dataset_report.report_page import THUMBNAIL_SIDE, check_page_path, write_page
    from diffsynth_core.dataset_report.validate import CheckOptions, validate

    thresholds = Thresholds(**{name: values.pop(name) for name in threshold_facts()})
    raise_if_any(_unknown_options(context.args))
    if fix:
        check_target(fix)
    if page:
        check_page_path(page)
    flags = {name: value for name, value in values.items() if value is not None}
    resolved = choose_stage(resolve_stages(as_flags(path, flags)))
    rules = rules_of_run(resolved, thresholds)
    base, given = resolved.parameters.dataset_base_path, resolved.parameters.dataset_metadata_path
    reporter = ConsoleReporter()
    options = CheckOptions(depth.value, workers, THUMBNAIL_SIDE if page else None)
    with handle_sigint():  # so that no worker is left behind
        report, dataset = validate(base, rules, options, reporter, given)
    _print(report, output_format)
    if page:
        write_page(page, report, dataset)
        reporter.info(f"wrote `{page}` ({format_bytes(page.stat().st_size)})")
    if fix:
        _tell_fixed(write_fixed(fix, dataset, report), reporter)
    return report.exit_code


def _with_options() -> Any:
    """The command with an option for each parameter that decides how data is read, as `train` has it, and for each
    threshold, in place of `**values`."""
    signature = inspect.signature(validate_dataset)
    fixed = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[type(default), typer.Option(f"--{name}", help=f"{text} ({unit})")],
        )
        for name, (default, unit, text) in threshold_facts().items()
    ]
    options += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=setting_option(setting))
        for name, setting in SETTINGS.items()
        if setting.reads_data
    ]

    def command(**values: Any) -> int:
        return validate_dataset(**values)

    command.__signature__ = inspect.Signature([*fixed, *options])  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in (*fixed, *options)}
    return command


def _unknown_options(words: Sequence[str]) -> list[Problem]:
    """What no option took: a parameter of training that has no say in how data is read, or a misspelling."""
    known = [*threshold_facts(), *(name for name, setting in SETTINGS.items() if setting.reads_data), *OWN_OPTIONS]
    refusal = "is an option of `train` that does not change how the dataset is read"
    return unknown_options(words, known, "dataset validate", refusal)


def _print(report: "Report", output_format: ReportFormat) -> None:
    """The report on stdout."""
    if output_format is ReportFormat.JSON:
        text = json.dumps(report.as_plain(), indent=2, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError:  # an unpaired surrogate, which JSON can only hold escaped
            text = json.dumps(report.as_plain(), indent=2)
        echo(text)
        return
    from rich.console import Console

    from diffsynth_cli.console import color_system
    from diffsynth_cli.text.dataset import report_texts
    from diffsynth_cli.text.wrapping import terminal_width

    width = terminal_width() or WHOLE_LINES
    console = Console(highlight=False, color_system=color_system(), width=width)
    for block in report_texts(report, width):
        console.print(block)


def _tell_fixed(fixed: "Fixed", reporter: "ConsoleReporter") -> None:
    """What was written, and how to train on it."""
    reporter.info(f"wrote `{fixed.path}`: {pluralize(fixed.kept, 'row')}, {pluralize(fixed.left_out, 'row')} removed")
    where = (
        ""
        if fixed.beside_files
        else f"; to check it as well, write it to `{fixed.base}`, which its paths are relative to"
    )
    reporter.info(f"train on it with `--dataset_base_path {fixed.base} --dataset_metadata_path {fixed.path}`{where}")

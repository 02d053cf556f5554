"""`diffsynth dataset`: validate."""

import inspect
import json
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffsynth_cli.options import SPELLINGS, complete_recipe
from diffsynth_cli.printing import echo
from diffsynth_cli.stopping import stopping_cleanly
from diffsynth_cli.wrapping import help_with_examples
from diffsynth_core.progress import count_of, format_bytes
from diffsynth_core.validation.rules import Rules, Thresholds, threshold_facts

if TYPE_CHECKING:
    from diffsynth_cli.console import ConsoleReporter
    from diffsynth_core.validation.findings import Report
    from diffsynth_core.validation.fix import Fixed


class ReportFormat(StrEnum):
    TABLE = "table"
    JSON = "json"


class Depth(StrEnum):
    METADATA = "metadata"
    PATHS = "paths"
    FILES = "files"


HELP = """Check a dataset before training trips over it: metadata, paths, captions, and every file decoded to its end.

PATH is a folder (its metadata is found, or captions beside the files) or a metadata file. With --recipe the rules of its
family apply. Exit code 0 without errors, 1 with."""
EXAMPLES = (
    "diffsynth dataset validate data/mine",
    "diffsynth dataset validate data/mine --recipe qwen-image-lora",
    "diffsynth dataset validate data/mine/metadata.csv --format json",
    "diffsynth dataset validate data/mine --report report.html",
    "diffsynth dataset validate data/mine --fix data/mine/whole.csv",
)


def add_to(app: typer.Typer) -> None:
    datasets = typer.Typer(help="Check datasets.", no_args_is_help=True, rich_markup_mode=None)
    datasets.callback()(_group)
    datasets.command("validate", help=help_with_examples(HELP, *EXAMPLES), context_settings=SPELLINGS)(
        _with_thresholds()
    )
    app.add_typer(datasets, name="dataset")


def _group() -> None:
    """Check datasets."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for, beside the thresholds."""

    path: Path
    recipe: str | None
    output_format: ReportFormat
    depth: Depth
    workers: int
    batch_size: int | None
    fix: Path | None
    page: Path | None


def validate_dataset(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of the dataset, or its metadata file")],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", metavar="NAME", help="Recipe whose family's rules apply", autocompletion=complete_recipe
        ),
    ] = None,
    output_format: Annotated[
        ReportFormat, typer.Option("--format", help="table for people, json for programs")
    ] = ReportFormat.TABLE,
    depth: Annotated[
        Depth,
        typer.Option("--depth", help="metadata: rows and captions; paths: also whether files are there; files: all"),
    ] = Depth.FILES,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes that decode; 0: one for each core")] = 0,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch_size", min=1, help="Samples of a batch, for counts of batches and steps [recipe's, or 1]"
        ),
    ] = None,
    fix: Annotated[
        Path | None,
        typer.Option(
            "--fix", metavar="OUT.csv", help="Write a new metadata file without the rows that have errors; data stay"
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="FILE.html", help="Write a page with thumbnails, crops and histograms, for a browser"
        ),
    ] = None,
    **thresholds: Any,
) -> int:
    """Check a dataset and print the report."""
    options = Options(path, recipe, output_format, depth, workers, batch_size, fix, page)
    return _run(options, Thresholds(**thresholds))


def _with_thresholds() -> Any:
    """The command with an option for each threshold, in place of `**thresholds`."""
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

    def command(**values: Any) -> int:
        return validate_dataset(**values)

    command.__signature__ = inspect.Signature([*fixed, *options])  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in (*fixed, *options)}
    return command


def _run(options: Options, thresholds: Thresholds) -> int:
    from diffsynth_cli.console import ConsoleReporter
    from diffsynth_core.validation.fix import check_target, write_fixed
    from diffsynth_core.validation.recipe_rules import rules_of_recipe
    from diffsynth_core.validation.report_page import THUMBNAIL_SIDE, check_page_path, write_page
    from diffsynth_core.validation.validate import Wish, validate

    if options.fix:
        check_target(options.fix)
    if options.page:
        check_page_path(options.page)
    rules = rules_of_recipe(options.recipe, thresholds) if options.recipe else Rules(thresholds=thresholds)
    if options.batch_size:
        rules = replace(rules, batch_size=options.batch_size)
    reporter = ConsoleReporter()
    wish = Wish(options.depth.value, options.workers, THUMBNAIL_SIDE if options.page else None)
    with stopping_cleanly():  # so that no worker is left behind
        report, examined = validate(options.path, rules, wish, reporter)
    _print(report, options.output_format)
    if options.page:
        write_page(options.page, report, examined)
        reporter.info(f"wrote `{options.page}` ({format_bytes(options.page.stat().st_size)})")
    if options.fix:
        _tell_fixed(write_fixed(options.fix, examined, report), reporter)
    return report.exit_code


def _print(report: "Report", output_format: ReportFormat) -> None:
    """The report on stdout."""
    if output_format is ReportFormat.JSON:
        text = json.dumps(report.as_plain(), indent=2, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError:  # half a character, which JSON can only hold spelled out
            text = json.dumps(report.as_plain(), indent=2)
        echo(text)
        return
    from rich.console import Console

    from diffsynth_cli.console import color_system
    from diffsynth_cli.dataset_text import report_tables

    console = Console(highlight=False, color_system=color_system())
    for table in report_tables(report):
        console.print(table)


def _tell_fixed(fixed: "Fixed", reporter: "ConsoleReporter") -> None:
    """What was written, and how to train on it."""
    reporter.info(f"wrote `{fixed.path}`: {count_of(fixed.kept, 'row')}, {count_of(fixed.left_out, 'row')} left out")
    where = (
        "" if fixed.beside_files else f"; to check it too, write it to `{fixed.base}`, which its paths are relative to"
    )
    reporter.info(f"train on it with `--dataset_base_path {fixed.base} --dataset_metadata_path {fixed.path}`{where}")

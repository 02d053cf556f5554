"""`diffsynth dataset`: validate."""

import inspect
import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from diffsynth_cli.options import SPELLINGS
from diffsynth_core.validation.rules import Rules, Thresholds, threshold_facts


class ReportFormat(StrEnum):
    TABLE = "table"
    JSON = "json"


class Depth(StrEnum):
    METADATA = "metadata"
    PATHS = "paths"
    FILES = "files"


HELP = """Check a dataset before training trips over it: metadata, paths, captions, and every file decoded to its end.

PATH is a folder (its metadata is found, or captions beside the files) or a metadata file. With --recipe the rules of its
family apply. Exit code 0 without errors, 1 with.

Examples:

  diffsynth dataset validate data/mine

  diffsynth dataset validate data/mine --recipe qwen-image-lora

  diffsynth dataset validate data/mine/metadata.csv --format json
"""


def add_to(app: typer.Typer) -> None:
    datasets = typer.Typer(help="Check datasets.", no_args_is_help=True, rich_markup_mode=None)
    datasets.callback()(_group)
    datasets.command("validate", help=HELP, context_settings=SPELLINGS)(_with_thresholds())
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


def validate_dataset(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of the dataset, or its metadata file")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", metavar="NAME", help="Recipe whose family's rules apply")
    ] = None,
    output_format: Annotated[
        ReportFormat, typer.Option("--format", help="table for people, json for programs")
    ] = ReportFormat.TABLE,
    depth: Annotated[
        Depth,
        typer.Option("--depth", help="metadata: rows and captions; paths: also whether files are there; files: all"),
    ] = Depth.FILES,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes that decode; 0: one for each core")] = 0,
    **thresholds: Any,
) -> int:
    """Check a dataset and print the report."""
    return _run(Options(path, recipe, output_format, depth, workers), Thresholds(**thresholds))


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
    from diffsynth_cli.dataset_text import report_lines
    from diffsynth_core.validation.recipe_rules import rules_of_recipe
    from diffsynth_core.validation.validate import Wish, validate

    rules = rules_of_recipe(options.recipe, thresholds) if options.recipe else Rules(thresholds=thresholds)
    wish = Wish(options.depth.value, options.workers)
    report, _ = validate(options.path, rules, wish, ConsoleReporter())
    if options.output_format is ReportFormat.JSON:
        typer.echo(json.dumps(report.as_plain(), indent=2, ensure_ascii=False))
    else:
        for line in report_lines(report):
            typer.echo(line)
    return report.exit_code

"""`diffsynth download`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffsynth_cli.options import SPELLINGS, complete_recipe
from diffsynth_cli.printing import echo, printable
from diffsynth_cli.text.wrapping import help_with_examples

if TYPE_CHECKING:
    from diffsynth_core.hub.download_plan import DownloadPlan
    from diffsynth_core.planning.model.download_request import DownloadRequest

HELP = """Download the files of recipes, models and datasets from the hubs.

NAME is a recipe, or MODEL_ID:GLOB as in recipes. Models are stored in --local_model_path, else
DIFFSYNTH_MODEL_BASE_PATH, else ./models, including config.json, tokenizer and processor. Existing files are not
downloaded again, and interrupted downloads resume."""
"""Help text of the command."""
EXAMPLES = (
    "diffsynth download qwen-image-lora",
    "diffsynth download wan2.1-t2v-1.3b-lora --dry_run",
    "diffsynth download 'Qwen/Qwen-Image:vae/*' --source huggingface",
    "diffsynth download --dataset DiffSynth-Studio/diffsynth_example_dataset --include 'qwen_image/Qwen-Image/*'",
)
"""Examples in the help text."""


class Format(StrEnum):
    """Values of `--format`."""

    TABLE = "table"
    JSON = "json"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("download", help=help_with_examples(HELP, *EXAMPLES), context_settings=SPELLINGS)(download)


def download(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Recipes, or MODEL_ID:GLOB", autocompletion=complete_recipe),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="ID", help="Dataset to download instead of models")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", metavar="GLOB", help="Only these files of the dataset; repeatable")
    ] = None,
    local_dir: Annotated[
        Path | None, typer.Option("--local_dir", help="Folder of the dataset; default: data/<its name>")
    ] = None,
    local_model_path: Annotated[
        Path | None,
        typer.Option("--local_model_path", help="Folder of all models, overrides DIFFSYNTH_MODEL_BASE_PATH"),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--source", metavar="HUB", help="modelscope or huggingface; default: DIFFSYNTH_DOWNLOAD_SOURCE, modelscope"
        ),
    ] = None,
    offline: Annotated[
        bool | None,
        typer.Option(
            "--offline/--no_offline",
            help="Access no hub, list missing files; default: DIFFSYNTH_SKIP_DOWNLOAD",
            show_default=False,
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Hash existing files to compare them; default: compare sizes and known hashes"),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="Print the list and exit")] = False,
    output_format: Annotated[
        Format, typer.Option("--format", help="table: for reading, json: for other programs, on stdout")
    ] = Format.TABLE,
) -> int:
    """List the files and what is on disk, then download the rest."""
    from diffsynth_core.hub.client import downloads_disabled
    from diffsynth_core.planning.model.download_request import request_download

    request = request_download(names or [], dataset, include or [], local_dir, local_model_path)
    as_json = output_format is Format.JSON
    if not request.files and not as_json:
        echo("Nothing to download: the model is shipped with diffsynth")
        return 0
    if downloads_disabled() if offline is None else offline:
        return _check_offline(request, as_json)
    return (_list if dry_run else _download)(request, source, verify, as_json)


def _list(request: "DownloadRequest", source: str | None, verify: bool, as_json: bool) -> int:
    """Print the list only."""
    from diffsynth_cli.console import ConsoleReporter
    from diffsynth_cli.text.download import plan_as_data, plan_lines
    from diffsynth_core.hub.download import list_download

    plan = list_download(request.files, request.base, source, ConsoleReporter(), verify)
    echo(json.dumps(plan_as_data(plan), indent=2) if as_json else "\n".join(map(printable, plan_lines(plan))))
    plan.check_disk()
    return 0


def _download(request: "DownloadRequest", source: str | None, verify: bool, as_json: bool) -> int:
    """Print the list, then download."""
    from diffsynth_cli.console import ConsoleReporter
    from diffsynth_cli.text.download import plan_as_data, plan_lines, result_line
    from diffsynth_core.hub.download import download

    reporter = ConsoleReporter()

    def show(plan: "DownloadPlan") -> None:
        if as_json:
            echo(json.dumps(plan_as_data(plan), indent=2))
        else:
            for line in plan_lines(plan):
                reporter.info(line)

    plan = download(request.files, request.base, source, reporter, show, verify)
    if not as_json:
        echo(result_line(plan))
    return 0


def _check_offline(request: "DownloadRequest", as_json: bool) -> int:
    """Offline: list the missing files, judged by name, and the download command."""
    from diffsynth_core.errors import raise_if_any
    from diffsynth_core.planning.model.download_request import offline_problems

    missing = request.missing()
    if as_json:
        shown = [
            {"wanted": str(item), "state": "missing" if item in missing else "here"}
            for item in request.files
            if not item.optional
        ]
        echo(json.dumps({"base": str(request.base), "wanted": shown}, indent=2))
    raise_if_any(offline_problems(request))
    if not as_json:
        echo(f"All files are present below `{request.base}`, judging by their names")
    return 0

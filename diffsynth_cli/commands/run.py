"""`diffsynth run`: show."""

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffsynth_cli.printing import echo, echo_line
from diffsynth_cli.text.wrapping import help_with_examples, terminal_width, wrap_line
from diffsynth_core.errors import EXIT_FAILED

if TYPE_CHECKING:
    from diffsynth_core.run_page.facts import RunFacts, RunReader

POLL_SECONDS = 2.0
"""How often the files of a run that is followed are looked at."""
PROGRESS_SECONDS = 10.0
"""Minimum time between two lines of progress."""
SHOW_HELP = """Show how a run is going, or how it ended.

It is read from the files in its folder: over ssh, from another terminal, also of a run that was killed. The page
report.html in the folder shows the same and more in a browser.

With --follow, progress is printed until the run ends. Exit code 0; with --follow 1 if the run ended without
completing its steps."""
"""Help text of `run show`."""
EXAMPLES = (
    "diffsynth run show models/train/qwen-image-lora",
    "diffsynth run show models/train/qwen-image-lora --follow",
)
"""Examples in the help text."""


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    runs = typer.Typer(help="Show runs.", no_args_is_help=True, rich_markup_mode=None)
    runs.callback()(_group)
    runs.command("show", help=help_with_examples(SHOW_HELP, *EXAMPLES))(show_run)
    app.add_typer(runs, name="run")


def _group() -> None:
    """Show runs."""


def show_run(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of the run, its output path")],
    follow: Annotated[bool, typer.Option("--follow", help="Print progress until the run ends")] = False,
) -> int:
    """Print what is known from the folder of a run."""
    from diffsynth_core.run_page.facts import RunReader
    from diffsynth_core.run_page.text import as_text

    reader = RunReader(path)
    facts = reader.read()
    _print(as_text(facts))
    if not follow:
        return 0
    if facts.status == "running":
        facts = _follow(reader, facts)
        _print(["", *as_text(facts)])
    return 0 if facts.status == "completed" else EXIT_FAILED


def _follow(reader: "RunReader", facts: "RunFacts") -> "RunFacts":
    """Print progress until the run ends; return what is known then."""
    from diffsynth_core.run_page.text import news_lines, progress_line, shown_of

    echo()
    shown, progress_due = shown_of(facts), 0.0
    while facts.status == "running":
        time.sleep(POLL_SECONDS)
        facts = reader.read()
        _print(news_lines(facts, shown))
        if facts.step != shown.step and time.monotonic() >= progress_due:
            _print([progress_line(facts)])
            progress_due = time.monotonic() + PROGRESS_SECONDS
        shown = shown_of(facts)
    return facts


def _print(lines: Iterable[str]) -> None:
    """Print lines as they are found, wrapped for a terminal apart from commands to copy."""
    width = terminal_width()
    for line in lines:
        echo_line(line if line.startswith("  diffsynth ") else wrap_line(line, width))
    sys.stdout.flush()

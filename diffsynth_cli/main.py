"""Entry point: the commands, and the one boundary where errors become messages and exit codes."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from diffsynth_cli import REPORTS, STOPPED
from diffsynth_cli.completion import LINE_VARIABLES, typed_line
from diffsynth_cli.printing import echo
from diffsynth_cli.streams import guarded_streams

GROUPS = ("dataset", "recipe")
"""Commands that have subcommands."""
COMMANDS = {
    "train": ("diffsynth_cli.commands.train", "Train from a recipe: LoRA, full, or both"),
    "dataset": ("diffsynth_cli.commands.dataset", "Check a dataset before training"),
    "split-ckpt": ("diffsynth_cli.commands.split_ckpt", "Split a checkpoint by component or size, or join one"),
    "download": ("diffsynth_cli.commands.download", "Download files of recipes, models and datasets"),
    "merge-lora": ("diffsynth_cli.commands.merge_lora", "Merge LoRAs into a base, or into one LoRA"),
    "convert-lora": ("diffsynth_cli.commands.convert_lora", "Convert a LoRA to the format of another program"),
    "recipe": ("diffsynth_cli.commands.recipe", "List and show recipes, print their JSON schema"),
}
"""Command -> the module that builds it (its function `add_to`), and its line in the help."""


def build_app(named: str | None) -> typer.Typer:
    """The application; only the requested command is imported, so that `diffsynth --help` is fast."""
    app = typer.Typer(
        name="diffsynth",
        help="Train diffusion transformers (Qwen-Image, FLUX, Wan) from YAML recipes.",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback()(_root)
    for command, (module, help_line) in COMMANDS.items():
        if command == named:
            import_module(module).add_to(app)
        else:
            app.command(command, help=help_line)(_not_named)
    return app


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version  # not imported for `--help`

        echo(f"diffsynth {version('diffsynth-cli')}")
        raise typer.Exit()


def _root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Before every command."""


def _not_named() -> None:
    """A placeholder for a command in the help of the others."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 wrong use, 128 + N stopped by signal N."""
    with guarded_streams():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    named = next((word for word in words or _typed_words() if not word.startswith("-")), None)
    try:
        app = build_app(named)
        outcome = app(words, standalone_mode=False, prog_name="diffsynth")
    except Exception as error:
        return _report(error, words, named)
    except KeyboardInterrupt:
        outcome = STOPPED
    if outcome == STOPPED:  # Typer uses this exit code for Ctrl-C too, without a message
        echo("Interrupted", err=True)
    return outcome if isinstance(outcome, int) else 0


def _typed_words() -> list[str]:
    """The words behind `diffsynth` of a line that a shell asks completions for; typer reads them as changed here."""
    for variable in LINE_VARIABLES:
        if os.environ.get(variable):
            os.environ[variable] = line = typed_line()
            return line.split()[1:]
    return []


def _report(error: Exception, words: Sequence[str], named: str | None) -> int:
    """Print an error to stderr, or report it to the launcher that prints it once for all processes; returns the exit
    code."""
    from diffsynth_cli.errors import ending_of

    given = list(words[words.index(named) :][: 2 if named in GROUPS else 1]) if named in COMMANDS else []
    ending = ending_of(error, " ".join(["diffsynth", *(word for word in given if not word.startswith("-"))]))
    if REPORTS in os.environ:
        from diffsynth_cli.ranks import report_ending

        if report_ending(ending):
            return ending.code
    ending.show()
    return ending.code

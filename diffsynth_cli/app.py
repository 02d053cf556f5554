"""The application: the commands, of which only the requested one is imported."""

from importlib import import_module
from typing import Annotated

import typer

from diffsynth_cli.printing import echo

COMMANDS = {
    "train": ("diffsynth_cli.commands.train", "Train from a recipe: LoRA, full, or both"),
    "generate": ("diffsynth_cli.commands.generate", "Draw images and clips with a model, LoRAs or a run"),
    "run": ("diffsynth_cli.commands.run", "Show how a run is going, or how it ended"),
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

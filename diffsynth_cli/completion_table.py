"""Builds the table for shell completion from typer's commands."""

import sys
from contextlib import suppress
from importlib import import_module
from typing import Any

import typer

from diffsynth_cli.app import COMMANDS, build_app
from diffsynth_cli.remembered_commands import ArgumentEntry, CommandEntry, OptionEntry, Table, file_stamp, table_path
from diffsynth_core.config.recipes import recipe_folder
from diffsynth_core.errors import DiffSynthError
from diffsynth_core.files import write_json


def remember_commands() -> CommandEntry:
    """Write the table to the cache if possible, and return the commands."""
    for module, _ in COMMANDS.values():
        import_module(module)
    path = table_path()
    with suppress(OSError, DiffSynthError):  # full or read-only disk, package in an archive
        stamps = {source: file_stamp(source) for source in sources()}  # taken before the commands are read
        root = commands()
        if path:
            write_json(path, Table(stamps=stamps, root=root))
        return root
    return commands()


def sources() -> list[str]:
    """Return what the table depends on: the imported modules of this package, typer, and the folders of recipes."""
    ours = {
        module.__file__
        for name, module in sys.modules.items()
        if name.partition(".")[0] in ("diffsynth_cli", "diffsynth_core") and getattr(module, "__file__", None)
    }
    recipes = recipe_folder()
    return sorted({str(path) for path in (*ours, typer.__file__, recipes, recipes / "accelerate")})


def commands() -> CommandEntry:
    """Return all commands, with the summaries that `diffsynth --help` shows."""
    root = entry(typer.main.get_command(build_app(None)))
    for name, listed in root["commands"].items():
        full = entry(typer.main.get_command(build_app(name)))["commands"][name]
        root["commands"][name] = {**full, "help": listed["help"]}
    return root


def entry(command: Any, parent: typer.Context | None = None) -> CommandEntry:
    """Return the options, arguments and subcommands of a typer command."""
    context = command.make_context(command.name, [], parent=parent, resilient_parsing=True)
    options: list[OptionEntry] = []
    arguments: list[ArgumentEntry] = []
    for parameter in command.get_params(context):
        values = [item.value for item in parameter.shell_complete(context, "")]
        if parameter.param_type_name == "argument":
            arguments.append({"values": values, "takes_all": parameter.nargs == -1})
        elif not parameter.hidden:
            names = [*parameter.opts, *parameter.secondary_opts]
            options.append(
                {
                    "names": names,
                    "help": parameter.help or "",
                    "is_flag": parameter.is_flag,
                    "repeatable": parameter.multiple,
                    "values": values,
                }
            )
    subcommands = getattr(command, "commands", {})
    return {
        "help": command.get_short_help_str(),
        "options": options,
        "arguments": arguments,
        "commands": {name: entry(one, context) for name, one in subcommands.items() if not one.hidden},
    }

"""Options generated from the declaration of parameters: all of `train`, and those that other commands share."""

import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from diffsynth_core.config.documents import format_value
from diffsynth_core.config.parameters import GROUPS, SETTINGS, Setting
from diffsynth_core.config.recipes import launcher_presets, recipe_names
from diffsynth_core.errors import Problem, suggest

METAVARS = {
    "int": "INTEGER",
    "float": "NUMBER",
    "path": "PATH",
    "memory": "AMOUNT",
    "duration": "DURATION",
    "split": "SHARE|PATH",
    "blocks": "INTEGER|auto",
    "str": "TEXT",
    "comma list": "A,B,…",
    "number pair": "A,B",
    "arguments": "NAME=VALUE…",
    "quant options": "ENTRY:METHOD…",
    "json list": "JSON",
}
"""Type of a parameter -> its placeholder in the help."""
HELP_WIDTH = 80
"""Width of the help text."""


SPELLINGS: dict[str, Any] = {"token_normalize_func": lambda name: name.replace("-", "_")}
"""Treat `--lora-rank` as `--lora_rank`."""
BOTH_SPELLINGS = SPELLINGS | {"allow_extra_args": True, "ignore_unknown_options": True}
"""Unknown options are left for our own report, with all other problems."""


def with_setting_options(function: Callable[[typer.Context, dict[str, Any]], int]) -> Callable[..., int]:
    """A command with one option per parameter, which calls `function` with the values that were given."""

    def command(context: typer.Context, **values: Any) -> int:
        return function(context, {name: value for name, value in values.items() if value is not None})

    options = [
        inspect.Parameter(
            setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=setting_option(setting)
        )
        for setting in SETTINGS.values()
    ]
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    command.__signature__ = inspect.Signature([context, *options])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in (context, *options)}
    command.__doc__ = function.__doc__
    return command


def setting_option(setting: Setting, help_text: str | None = None) -> Any:
    """The option's type for Typer; values other than flags stay strings, which the declaration itself converts.

    `help_text`: what the parameter does in this command; None: as declared.
    """
    help_text = help_text or setting.help_text
    short = [f"-{setting.short}"] if setting.short else []
    if setting.type_name == "bool":
        names = (f"--{setting.name}/--no_{setting.name}", *short)
        return Annotated[bool | None, typer.Option(*names, help=help_text, show_default=False)]
    return Annotated[
        str | None,
        typer.Option(
            f"--{setting.name}",
            *(f"--{alias}" for alias in setting.aliases),
            *short,
            metavar=metavar(setting),
            help=help_text,
            show_default=False,
            autocompletion=_completions(setting),
        ),
    ]


def unknown_options(words: Sequence[str], known: Sequence[str], command: str, refusal: str) -> list[Problem]:
    """The words that no option of a command took: a parameter of training, or a misspelling.

    Words that are no options may be the values of some, and are named only where there are none.

    Args:
        known: names of the options.
        refusal: what is said of a parameter of training.
    """
    names = [word.partition("=")[0] for word in words if word.startswith("-")] or words
    problems = []
    for given in names:
        name = given.removeprefix("--").replace("-", "_")
        if name.removeprefix("no_") in SETTINGS or name in SETTINGS:
            problems.append(Problem(f"`{given}` {refusal}", "remove it", wrong_use=True))
            continue
        near = suggest(name, known)
        hint = f"did you mean `--{near}`?" if near else f"see `diffsynth {command} --help`"
        problems.append(Problem(f"`{given}` is not an option of `{command}`", hint, wrong_use=True))
    return problems


def _completions(setting: Setting) -> Callable[[str], list[str]]:
    """The shell completion of an option's values; None if the shell completes file names."""
    if setting.name == "recipe":
        return complete_recipe

    def complete(incomplete: str) -> list[str]:
        from diffsynth_core.planning.training.optimizers import OPTIMIZERS

        tables = {"accelerate_config": tuple(launcher_presets()), "optimizer": tuple(OPTIMIZERS)}
        values = tables.get(setting.name, setting.choices)
        return [value for value in values if value.startswith(incomplete)]

    return complete


def complete_recipe(incomplete: str) -> list[str]:
    """The recipe names for shell completion."""
    return [name for name in recipe_names() if name.startswith(incomplete)]


def metavar(setting: Setting) -> str:
    """What follows an option's name in the help."""
    return "|".join(setting.choices) if setting.choices else METAVARS[setting.type_name]


class GroupedHelp(TyperCommand):
    """Help in the groups of the declaration, each name on a line of its own and never cut."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        formatter.write("\n")
        for group, title in GROUPS.items():
            formatter.write(f"{title}:\n")
            for setting in SETTINGS.values():
                if setting.group == group:
                    formatter.write("\n".join(option_help(setting)) + "\n")
            formatter.write("\n")
        formatter.write("  --help, -h\n      Show this help\n")


def _switched(value: Any) -> str:
    """A default as shown in the help; flags are on or off."""
    return ("on" if value else "off") if isinstance(value, bool) else format_value(value)


def option_help(setting: Setting) -> list[str]:
    """The help of one parameter."""
    if setting.type_name == "bool":
        head = [f"  --{setting.name}, --no-{setting.name}{f', -{setting.short}' if setting.short else ''}"]
    else:
        head = [f"  --{setting.name} {metavar(setting)}"]
        if len(head[0]) > HELP_WIDTH:
            head = [
                f"  --{setting.name}",
                *textwrap.wrap(
                    " | ".join(setting.choices), HELP_WIDTH - 6, initial_indent="      ", subsequent_indent="      "
                ),
            ]
    notes = []
    if setting.type_name != "bool" and setting.default not in (None, (), ""):
        notes.append(f"default: {format_value(setting.default)}")
    notes += [f"default for {family}: {_switched(value)}" for family, value in setting.family_defaults.items()]
    if setting.unit:
        notes.append(f"unit: {setting.unit}")
    if setting.families:
        notes.append(f"only {', '.join(setting.families)}")
    text = setting.help_text + (f" [{'; '.join(notes)}]" if notes else "")
    return head + textwrap.wrap(text, HELP_WIDTH - 6, initial_indent="      ", subsequent_indent="      ")

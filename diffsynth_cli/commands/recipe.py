"""`diffsynth recipe`: list, show, schema."""

import json
from enum import StrEnum
from typing import Annotated, Any

import typer

from diffsynth_cli.options import complete_recipe
from diffsynth_cli.printing import echo
from diffsynth_cli.text.wrapping import help_with_examples
from diffsynth_core.config.documents import command_line, recipe_schema, shown_values
from diffsynth_core.config.recipes import load_recipe, recipe_names
from diffsynth_core.config.resolve import resolve_stages
from diffsynth_core.config.templates import template_of
from diffsynth_core.errors import raise_if_any

SHOW_HELP = "Show a recipe with all documented parameters expanded, for each stage where it has stages."
"""Help text of `recipe show`."""


class ListFormat(StrEnum):
    """Values of `--format` of `recipe list`."""

    TABLE = "table"
    JSON = "json"


class ShowFormat(StrEnum):
    """Values of `--format` of `recipe show`."""

    YAML = "yaml"
    JSON = "json"
    FLAGS = "flags"
    TEMPLATE = "template"


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    recipes = typer.Typer(
        help="List and show recipes, print their JSON schema.", no_args_is_help=True, rich_markup_mode=None
    )
    recipes.command("list", help=help_with_examples("List all recipes.", "diffsynth recipe list --format json"))(
        list_recipes
    )
    recipes.command("show", help=help_with_examples(SHOW_HELP, "diffsynth recipe show qwen-image-lora --format flags"))(
        show_recipe
    )
    recipes.command("schema")(print_schema)
    app.add_typer(recipes, name="recipe")


def list_recipes(
    output_format: Annotated[
        ListFormat, typer.Option("--format", help="table: for reading, json: for other programs")
    ] = ListFormat.TABLE,
) -> None:
    """Print a line for each recipe."""
    recipes = [load_recipe(name) for name in recipe_names()]
    if output_format is ListFormat.JSON:
        echo(
            json.dumps(
                [
                    {"name": recipe.name, "family": recipe.family, "description": recipe.description}
                    for recipe in recipes
                ],
                indent=2,
            )
        )
        return
    width = max(len(recipe.name) for recipe in recipes)
    for recipe in recipes:
        echo(f"{recipe.name:<{width}}  {recipe.description}")


def show_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a recipe", autocompletion=complete_recipe)],
    output_format: Annotated[
        ShowFormat,
        typer.Option(
            "--format",
            help="yaml, json, flags: a complete command line, or template: a commented file for `train --config`",
        ),
    ] = ShowFormat.YAML,
) -> None:
    """Print what a recipe expands into."""
    if output_format is ShowFormat.TEMPLATE:
        echo(template_of(name))
        return
    recipe = load_recipe(name)
    stages = resolve_stages({"recipe": name})
    raise_if_any([problem for resolved in stages for problem in resolved.problems])
    values = {resolved.stage or "": shown_values(resolved.parameters) for resolved in stages}
    if output_format is ShowFormat.FLAGS:
        for stage, parameters in values.items():
            echo(_comment(stage, recipe.stages.get(stage, "")) + command_line(parameters))
        return
    content: dict[str, Any] = {"name": recipe.name, "description": recipe.description, "family": recipe.family}
    if recipe.stages:
        content["stages"] = {
            stage: {"description": recipe.stages[stage], "parameters": parameters}
            for stage, parameters in values.items()
        }
    else:
        content["parameters"] = values[""]
    echo(json.dumps(content, indent=2) if output_format is ShowFormat.JSON else _as_yaml(content))


def _comment(stage: str, description: str) -> str:
    """The line above the command line of a stage."""
    if not stage:
        return ""
    return f"# {stage}: {description}\n" if description else f"# {stage}\n"


def print_schema() -> None:
    """Print the JSON schema of recipes and config files, for editors."""
    echo(json.dumps(recipe_schema(), indent=2))


def _as_yaml(content: dict[str, Any]) -> str:
    """Format a recipe file; its name goes into the first line, since a file's name is not part of its content."""
    import yaml

    fields = {key: value for key, value in content.items() if key != "name"}
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=120)
    return f"# {content['name']}\n{text}".rstrip()

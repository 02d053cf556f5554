"""Documents generated from the declarations of parameters: JSON schema, reference page, command lines."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffsynth_core.config.parameters import ALIASES, GROUPS, SETTINGS, Parameters, Setting, as_plain
from diffsynth_core.config.recipes import NOT_IN_RECIPES, RECIPE_KEYS, STAGE_KEYS, STAGE_NAME
from diffsynth_core.files import write_json, write_text


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a recipe or `--config` file."""
    parameters = Parameters.model_json_schema(mode="validation")["properties"]
    for name in NOT_IN_RECIPES:
        del parameters[name]
    for value in parameters.values():
        value.pop("x-setting")
        value.pop("title", None)
        _name_bounds(value)
    parameters |= {alias: parameters[name] for alias, name in ALIASES.items() if name in parameters}
    texts: dict[str, Any] = {key: {"type": "string", "description": text} for key, text in RECIPE_KEYS.items()}
    texts["parameters"] = {
        "type": "object",
        "description": RECIPE_KEYS["parameters"],
        "properties": parameters,
        "additionalProperties": False,
    }
    stage: dict[str, Any] = {key: {"type": "string", "description": text} for key, text in STAGE_KEYS.items()}
    stage["parameters"] = {"$ref": "#/properties/parameters", "description": STAGE_KEYS["parameters"]}
    texts["stages"] = {
        "type": "object",
        "description": RECIPE_KEYS["stages"],
        "propertyNames": {"pattern": f"^{STAGE_NAME}$"},
        "additionalProperties": {"type": "object", "properties": stage, "additionalProperties": False},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "diffsynth recipe",
        "type": "object",
        "properties": texts,
        "additionalProperties": False,
    }


def _name_bounds(schema: dict[str, Any]) -> None:
    """Rename bounds to their JSON schema names: pydantic keeps its own names on optional numbers."""
    for pydantic_name, schema_name in (
        ("ge", "minimum"),
        ("gt", "exclusiveMinimum"),
        ("le", "maximum"),
        ("lt", "exclusiveMaximum"),
    ):
        if pydantic_name in schema:
            schema[schema_name] = schema.pop(pydantic_name)
    for part in (*schema.get("anyOf", ()), schema.get("items")):
        if part:
            _name_bounds(part)


def format_value(value: Any) -> str:
    """Format a value as one argument of a command line, before quoting."""
    if isinstance(value, (list, tuple)):
        flat = not any(isinstance(item, (list, tuple)) for item in value)
        return ",".join(map(format_value, value)) if flat else json.dumps(value)
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def flag(name: str, value: Any) -> str:
    """Return the flag that sets a parameter to a value in plain form, quoted for a shell."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no_{name}"
    return f"--{name} {shlex.quote(format_value(value))}"


def command_line(values: Mapping[str, Any], lead: str = "diffsynth train", overriding: bool = False) -> str:
    """Return a command line, one flag per line, that sets `values` (in the plain form of `as_plain`).

    Values of None are omitted. A boolean that is off is written as `--no-…` if its default is on, in general or in
    some family, and always if the command line is `overriding` the values of a recipe.
    """
    lines = [lead]
    for name, value in values.items():
        setting = SETTINGS[name]
        if value is None:
            continue
        if setting.type_name == "bool":
            if value != setting.default or setting.family_defaults or overriding:
                lines.append(f"--{name}" if value else f"--no-{name}")
        elif setting.type_name == "json list":
            text = value if isinstance(value, str) else json.dumps(value)  # a string as the user typed it, or a list
            lines += [f"--{name} {shlex.quote(text)}"] if value else []
        elif value not in ([], "") or setting.default not in ((), ""):
            lines.append(f"--{name} {shlex.quote(format_value(value))}")
    return " \\\n  ".join(lines)


def shown_values(parameters: Parameters) -> dict[str, Any]:
    """Return the plain values of the parameters that DiffSynth-Studio documents, and of others that are not default.

    `lora_format` is left out where `align_to_opensource_format` implies it.
    """
    values, defaults = as_plain(parameters), as_plain(Parameters())
    implied = {*NOT_IN_RECIPES, *(["lora_format"] if parameters.align_to_opensource_format else [])}
    changed = {name for name, value in values.items() if value != defaults[name]} - implied
    return {name: value for name, value in values.items() if SETTINGS[name].documented or name in changed}


def reference_page() -> str:
    """The text of `docs/parameters.md`."""
    lines = [
        "# Parameters",
        "",
        "Generated from the declarations by `make docs`; a test fails when this page is out of date.",
        "",
        "Set a parameter as a flag (`--lora_rank 16`, `--lora-rank 16`), in a `--config` file or in a recipe. Flags",
        "override the file, which overrides the recipe, which overrides the default. Every boolean flag",
        "has a `--no-…` form.",
        "",
        "Names marked ¹ are those of DiffSynth-Studio. The column *changes* states what a different value changes in a run:",
        "the numbers computed in a step, the files written, speed and memory, or nothing. A resumed run may change all",
        "but numbers; of these, it may change what is compared by its effect (in brackets) if the effect is the same.",
    ]
    for group, title in GROUPS.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| parameter | type | default | what it does | changes |",
            "|---|---|---|---|---|",
        ]
        lines += [_reference_row(setting) for setting in SETTINGS.values() if setting.group == group]
    return "\n".join(lines) + "\n"


def _reference_row(setting: Setting) -> str:
    marks = "¹" if setting.documented else ""
    kind = " \\| ".join(setting.choices) if setting.choices else setting.type_name
    default = "" if setting.default in (None, (), "") else f"`{format_value(setting.default)}`"
    default += "".join(f"; {family}: `{format_value(value)}`" for family, value in setting.family_defaults.items())
    unit = f" ({setting.unit})" if setting.unit else ""
    families = f" Only for: {', '.join(setting.families)}." if setting.families else ""
    families += "".join(f" Also `{alias}` ¹." for alias in setting.aliases)
    changes = setting.changes + (f" ({setting.compared.replace('_', '-')})" if setting.compared != "value" else "")
    return f"| `{setting.name}` {marks} | {kind}{unit} | {default} | {setting.help_text}.{families} | {changes} |"


def write_documents(folder: Path) -> None:
    """Write the reference page and the schema into the documentation folder of a checkout."""
    write_text(folder / "parameters.md", reference_page())
    write_json(folder / "recipe.schema.json", recipe_schema())


if __name__ == "__main__":
    import sys

    write_documents(Path(sys.argv[1]))

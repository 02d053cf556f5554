"""Documents generated from the declarations: command lines that reproduce a run, JSON schema, reference page."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from diffsynth_core.config.documents import (
    command_line,
    format_value,
    recipe_schema,
    reference_page,
    shown_values,
)
from diffsynth_core.config.parameters import ALIASES, GROUPS, SETTINGS, Parameters, as_plain
from diffsynth_core.config.recipes import NOT_IN_RECIPES, recipe_folder, recipe_names
from diffsynth_core.config.yaml_files import read_yaml
from diffsynth_core.planning.documents import (
    PAGE,
    SEVERAL_HEAD,
    memory_of_recipe,
    page_head,
    page_recipes,
    rows_of_several,
)

ROOT = Path(__file__).parents[3]


def read_command_line(values) -> Parameters:
    """Parse the command line for `values` with a shell and the options of `train`."""
    text = command_line(values, lead=r"printf '%s\0'")
    words = subprocess.run(["sh", "-c", text], check=True, capture_output=True, text=True).stdout.split("\0")[:-1]
    found: dict[str, object] = {}
    while words and words != [""]:
        name = words.pop(0).removeprefix("--")
        setting = SETTINGS[name.removeprefix("no-")]
        found[setting.name] = name == setting.name if setting.type_name == "bool" else words.pop(0)
    return Parameters.model_validate(found)


GIVEN = [
    {},
    {"learning_rate": 1.2345678901e-5, "weight_decay": 0.1 + 0.2, "max_grad_norm": 1 / 3},
    {"learning_rate": 1e-4, "max_pixels": 1328 * 1328, "seed": 2**63 - 1, "dataset_repeat": 10**12},
    {"output_path": 'my runs/it\'s "new" $HOME `x` \\ ; rm', "dataset_base_path": "ä ö/*"},
    {
        "model_paths": ["a b.safetensors", ["c'1.safetensors", 'd"2.safetensors']],
        "lora_target_modules": ["to_q", "to_out.0"],
    },
    {"model_paths": [["only.safetensors", "two.safetensors"]]},
    {"lora_target_modules": [], "data_file_keys": [], "remove_prefix_in_ckpt": ""},
    {"adam_betas": [0.9, 0.99], "caption_dropout": 0.1},
    {"find_unused_parameters": True, "use_gradient_checkpointing": True, "rehearse": False},
    {
        "model_id_with_origin_paths": ["Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors"],
        "task": "sft:train",
    },
    {"remove_prefix_in_ckpt": "two\nlines", "lora_base_model": "dit", "save_steps": 500, "height": 512, "width": 768},
]


@pytest.mark.parametrize("given", GIVEN)
def test_a_command_line_gives_the_same_parameters_again(given):
    parameters = Parameters.model_validate(given)
    assert read_command_line(as_plain(parameters)) == parameters


@pytest.mark.parametrize("name", recipe_names())
def test_the_values_of_a_recipe_survive_the_command_line(name):
    from diffsynth_core.config.resolve import resolve_stages

    for resolved in resolve_stages({"recipe": name}):
        values = shown_values(resolved.parameters)
        assert shown_values(read_command_line(values)) == values


def test_a_command_line_is_written_for_people():
    values = {"lora_rank": 16, "learning_rate": 1e-4, "find_unused_parameters": True, "rehearse": False, "save_steps": None,
              "model_paths": [], "lora_target_modules": ["a", "b"], "output_path": "my run"}  # fmt: skip
    assert command_line(values, "accelerate launch train.py").splitlines() == [
        "accelerate launch train.py \\",
        "  --lora_rank 16 \\",
        "  --learning_rate 0.0001 \\",
        "  --find_unused_parameters \\",
        "  --lora_target_modules a,b \\",
        "  --output_path 'my run'",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (16, "16"), ("a b", "a b"), (["a", "b"], "a,b"), ([], ""), (("image", "video"), "image,video"), (1.0, "1"), (0.01, "0.01"),
        (1e-5, "1e-05"), (0.30000000000000004, "0.30000000000000004"), (["a", ["b", "c"]], '["a", ["b", "c"]]'), ((0.9, 0.99), "0.9,0.99"), (Path("x/y"), "x/y"),
    ],
)  # fmt: skip
def test_values_as_one_argument(value, text):
    found = format_value(value)
    assert found == text or (isinstance(value, float) and float(found) == value)


def test_the_shown_values_are_the_documented_parameters_alone():
    assert set(shown_values(Parameters())) == {name for name, setting in SETTINGS.items() if setting.documented}


CHECKED_KEYWORDS = {
    "type", "anyOf", "enum", "const", "items", "properties", "additionalProperties", "propertyNames", "pattern", "$ref",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
}  # fmt: skip
TELLING_KEYWORDS = {"$schema", "title", "description", "default", "format"}
JSON_TYPES = {"string": str, "array": list, "object": dict, "boolean": bool, "null": type(None)}


def is_of_type(value, name: str) -> bool:
    if name in ("integer", "number"):
        return isinstance(value, int if name == "integer" else (int, float)) and not isinstance(value, bool)
    return isinstance(value, JSON_TYPES[name])


def faults(value, schema: dict, where: str = "$") -> list[str]:
    """Return what a JSON schema rejects in `value`; like an editor, it ignores unknown keywords."""
    found: list[str] = []
    if "$ref" in schema:
        return faults(value, at_pointer(schema["$ref"]), where)
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        return [f"{where}: {value!r} does not match"]
    if "type" in schema and not is_of_type(value, schema["type"]):
        return [f"{where}: {value!r} is no {schema['type']}"]
    branches = [faults(value, branch, where) for branch in schema.get("anyOf", [])]
    found += (
        [] if not branches or [] in branches else [f"{where}: {value!r} fits none of {len(branches)}", *branches[0]]
    )
    found += [f"{where}: {value!r}"] if value not in schema.get("enum", [value]) else []
    found += [f"{where}: {value!r}"] if value != schema.get("const", value) else []
    if is_of_type(value, "number"):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        found += [] if low <= value <= high else [f"{where}: {value} is out of bounds"]
        found += [] if value > schema.get("exclusiveMinimum", value - 1) else [f"{where}: {value} is out of bounds"]
    if isinstance(value, list):
        found += [fault for item in value for fault in faults(item, schema.get("items", {}), f"{where}[]")]
    if isinstance(value, dict):
        known = schema.get("properties", {})
        closed = schema.get("additionalProperties") is False
        found += [f"{where}: {key} is unknown" for key in value if closed and key not in known]
        found += [fault for key in value if key in known for fault in faults(value[key], known[key], f"{where}.{key}")]
        names, others = schema.get("propertyNames", {}), schema.get("additionalProperties")
        found += [fault for key in value for fault in faults(key, names, where)]
        if isinstance(others, dict):
            found += [fault for key in value.keys() - known for fault in faults(value[key], others, f"{where}.{key}")]
    return found


def at_pointer(pointer: str) -> dict:
    """Resolve a reference within the recipe schema."""
    part = recipe_schema()
    for word in pointer.removeprefix("#/").split("/"):
        part = part[word]
    return part


def keywords(schema: dict) -> set[str]:
    """Return all keywords of a schema, at any depth."""
    below = [
        *schema.get("properties", {}).values(),
        *schema.get("anyOf", []),
        *(
            schema[key]
            for key in ("items", "propertyNames", "additionalProperties")
            if isinstance(schema.get(key), dict)
        ),
    ]
    return set(schema).union(*(keywords(part) for part in below))


def test_the_schema_uses_words_that_editors_know():
    assert keywords(recipe_schema()) <= CHECKED_KEYWORDS | TELLING_KEYWORDS


@pytest.mark.parametrize("name", recipe_names())
def test_the_schema_takes_every_recipe(name):
    assert faults(read_yaml(recipe_folder() / f"{name}.yaml"), recipe_schema()) == []


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in NOT_IN_RECIPES])
def test_the_schema_takes_the_default_of_every_setting(name):
    default = as_plain(Parameters())[name]
    assert faults({"parameters": {name: default}}, recipe_schema()) == []


@pytest.mark.parametrize(
    "recipe",
    [
        {"parameters": {"lora_rnk": 3}},
        {"parameter": {}},
        {"lora_rank": 3},
        {"family": 3},
        {"parameters": []},
        *({"parameters": {name: True}} for name in sorted(NOT_IN_RECIPES)),
        {"parameters": {"lora_rank": 0}},
        {"parameters": {"lora_rank": True}},
        {"parameters": {"save_steps": 0}},
        {"parameters": {"max_steps": 0}},
        {"parameters": {"height": 15}},
        {"parameters": {"max_grad_norm": 0}},
        {"parameters": {"max_timestep_boundary": 1.5}},
        {"parameters": {"learning_rate": "fast"}},
        {"parameters": {"task": "train"}},
        {"parameters": {"trainable_models": [1]}},
        {"parameters": {"model_paths": [[1]]}},
        {"parameters": {"find_unused_parameters": "x"}},
        {"stages": []},
        {"stages": {"High": {}}},
        {"stages": {"a/b": {}}},
        {"stages": {"high": []}},
        {"stages": {"high": {"lora_rank": 3}}},
        {"stages": {"high": {"description": 3}}},
        {"stages": {"high": {"parameters": {"lora_rnk": 3}}}},
        {"stages": {"high": {"parameters": {"lora_rank": 0}}}},
        {"stages": {"high": {"parameters": {"only": "high"}}}},
    ],
)
def test_the_schema_refuses_what_the_parameters_refuse(recipe):
    assert faults(recipe, recipe_schema())


def test_the_schema_takes_stages():
    stages = {"high": {"description": "x", "parameters": {"lora_rank": 4}}, "low-2": {}, "3_x": {"parameters": {}}}
    assert faults({"stages": stages}, recipe_schema()) == []


def test_the_schema_explains_every_setting_and_nothing_else():
    properties = recipe_schema()["properties"]["parameters"]["properties"]
    assert set(properties) == (set(SETTINGS) - NOT_IN_RECIPES) | set(ALIASES)
    assert all(properties[name]["description"] == SETTINGS[ALIASES.get(name, name)].help_text for name in properties)
    assert recipe_schema() == recipe_schema()


def test_the_reference_page_has_one_row_for_each_setting():
    page = reference_page()
    rows = re.findall(r"^\| `(\w+)` ", page, re.MULTILINE)
    assert sorted(rows) == sorted(SETTINGS)
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == list(GROUPS.values())
    assert "| `learning_rate` ¹ | float | `0.0001` |" in page
    assert all(line.replace(r"\|", "").count("|") == 6 for line in page.splitlines() if line.startswith("|"))


def test_every_parameter_names_a_test_that_fails_when_it_is_ignored():
    proofs = read_yaml(ROOT / "tests/proofs.yaml")
    assert proofs.keys() == SETTINGS.keys()
    for name, proof in proofs.items():
        path, _, rest = proof.partition("::")
        function, _, case = rest.removesuffix("]").partition("[")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert f"\ndef {function}(" in text, proof
        assert not case or (case == name and f'"{case}"' in text), proof


def test_the_committed_documents_are_fresh():
    """Fails if a declaration changed without `make docs`."""
    folder = ROOT / "docs"
    assert (folder / "parameters.md").read_text(encoding="utf-8") == reference_page()
    assert json.loads((folder / "recipe.schema.json").read_text(encoding="utf-8")) == recipe_schema()


ONE_OF_EACH_KIND = ("flux.1-dev-lora", "flux.2-klein-9b-full", "qwen-image-edit-2511-lora", "wan2.2-ti2v-5b-lora")
"""Recipes whose row is checked at each change; `make test-all` checks all."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [name if name in ONE_OF_EACH_KIND else pytest.param(name, marks=pytest.mark.long) for name in page_recipes()],
)
def test_the_rows_and_flags_of_gpu_memory_are_those_of_the_recipe(recipe):
    page = (ROOT / "docs" / PAGE).read_text(encoding="utf-8")
    found = list(memory_of_recipe(recipe))
    rows, of_several = (
        [line for line in part.splitlines() if line.startswith(f"| `{recipe}`")] for part in page.split(SEVERAL_HEAD)
    )
    assert rows == [each.row for each in found]
    assert of_several == list(rows_of_several(recipe))
    for each in found:
        assert "\n".join(each.flag_lines) in page


def test_the_page_of_gpu_memory_has_all_recipes_below_its_head():
    page = (ROOT / "docs" / PAGE).read_text(encoding="utf-8").partition(SEVERAL_HEAD)[0].splitlines()
    head = page_head()
    assert page[: len(head)] == head
    rows = [line for line in page[len(head) :] if line.startswith("| ")]
    assert list(dict.fromkeys(row.split("`")[1] for row in rows)) == page_recipes()


LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)]+))?\)")


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_links_of_the_documentation_lead_somewhere(page):
    path = ROOT / page
    for target, anchor in LINK.findall(path.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        linked = path.parent / target if target else path
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings], (
            anchor
        )


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert all(f"]({path.name})" in index for path in (ROOT / "docs").glob("*.md") if path.name != "README.md")

"""Recipes: a closed schema, single inheritance, stages, and the shipped recipes."""

import pytest

from diffsynth_core.config.recipes import (
    NOT_IN_RECIPES,
    RECIPE_KEYS,
    STAGE_KEYS,
    Overrides,
    load_recipe,
    load_recipe_file,
    recipe_folder,
    recipe_names,
)
from diffsynth_core.config.resolve import resolve, resolve_stages
from diffsynth_core.errors import DiffSynthError, FaultsFound
from diffsynth_core.hub.model_files import split_entry
from diffsynth_core.models.recognition import component_at
from diffsynth_core.models.registry import FAMILIES
from tests.naming import in_any_order, names

ENCODERS = {
    "wan2.1-i2v": ("text_encoder", "image_encoder"),
    "flux.1": ("text_encoder_1", "text_encoder_2"),
    "": ("text_encoder",),
}
"""Prefix of recipe names -> encoders other than the VAE; the first match."""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "mine.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def test_the_shipped_recipes_are_found():
    assert set(recipe_names()) >= {"qwen-image-2512-full", "qwen-image-2512-lora", "qwen-image-full", "qwen-image-lora"}
    assert list(recipe_names()) == sorted(path.stem for path in recipe_folder().glob("*.yaml"))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves_without_a_problem(name):
    recipe = load_recipe(name)
    stages = resolve_stages({"recipe": name})
    assert [problem for resolved in stages for problem in resolved.problems] == []
    assert [resolved.stage for resolved in stages] == (list(recipe.stages) or [None])
    assert recipe.name == name and recipe.description and recipe.family in FAMILIES
    assert not NOT_IN_RECIPES & recipe.parameters.keys() and all(recipe.stages.values())


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_names_files_of_each_component_of_its_family(name):
    recipe = load_recipe(name)
    facts = FAMILIES[recipe.family or ""]
    for resolved in resolve_stages({"recipe": name}):
        parameters = resolved.parameters
        places = [split_entry(entry)[1] for entry in parameters.model_id_with_origin_paths]
        named = [component_at(place, facts).name for place in places]
        encoders = next(encoders for begin, encoders in ENCODERS.items() if name.startswith(begin))
        assert sorted(named) == sorted(("dit", "vae", *encoders))
        assert parameters.lora_base_model or parameters.trainable_models


@pytest.mark.parametrize(
    ("name", "rate", "epochs", "first"),
    [
        ("qwen-image-lora", 1e-4, 5, "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors"),
        ("qwen-image-full", 1e-5, 2, "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors"),
        ("qwen-image-2512-lora", 1e-4, 5, "Qwen/Qwen-Image-2512:transformer/diffusion_pytorch_model*.safetensors"),
        ("qwen-image-2512-full", 1e-5, 2, "Qwen/Qwen-Image-2512:transformer/diffusion_pytorch_model*.safetensors"),
    ],
)
def test_the_values_of_the_shipped_recipes(name, rate, epochs, first):
    parameters = resolve({"recipe": name}).parameters
    assert (parameters.learning_rate, parameters.num_epochs) == (rate, epochs)
    assert parameters.model_id_with_origin_paths[0] == first
    assert (parameters.lora_rank, parameters.dataset_repeat, parameters.max_pixels) == (32, 50, 1048576)


def test_a_recipe_starts_from_the_one_it_extends(write):
    recipe = load_recipe_file(write("extends: qwen-image-2512-lora\nparameters:\n  lora_rank: 4\n"))
    parent = load_recipe("qwen-image-2512-lora")
    assert recipe.parameters == {**parent.parameters, "lora_rank": 4}
    assert (recipe.name, recipe.family, recipe.description) == ("mine", "qwen-image", "")


def test_lists_are_replaced_and_not_joined(write):
    recipe = load_recipe_file(write("extends: qwen-image-lora\nparameters:\n  lora_target_modules: [to_q]\n"))
    assert recipe.parameters["lora_target_modules"] == ["to_q"]


@pytest.mark.parametrize("text", ["", "parameters:\n", "description: x\n"])
def test_a_recipe_may_leave_everything_out(write, text):
    recipe = load_recipe_file(write(text))
    assert dict(recipe.parameters) == {} and recipe.family is None


def test_all_wrong_keys_of_a_file_are_kept_beside_what_is_right(says, write):
    path = write(
        "parameter: {}\nfamily: 3\nlora_rank: 4\nextends: qwen-image-lora\n"
        "parameters:\n  lora_rnk: 1\n  rehearse: true\n  seed: 7\n  5: x\n"
    )
    recipe = load_recipe_file(path)
    says(recipe.problems)
    assert [problem.message for problem in recipe.problems] == in_any_order(
        names(path, "parameter", "not a key"),
        names(path, "family", "a string", 3),
        names(path, "lora_rank", "not a key"),
        names("lora_rnk", path, "not a parameter"),
        names("rehearse", path, "single command"),
        names(5, path, "not a parameter"),
    )
    assert all(problem.wrong_use for problem in recipe.problems)
    assert recipe.parameters == {**load_recipe("qwen-image-lora").parameters, "seed": 7}
    assert recipe.family is None


@pytest.mark.parametrize("name", sorted(NOT_IN_RECIPES))
def test_what_one_command_does_has_no_place_in_a_file(says, write, name):
    recipe = load_recipe_file(write(f"parameters:\n  {name}: true\n"))
    (problem,) = recipe.problems
    says([problem])
    assert problem.message == names(name, "single command") and "mine.yaml" in problem.message
    assert dict(recipe.parameters) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("parameters: [1]\n", names("parameters", "a list")),
        ("parameters: lora_rank\n", names("parameters", "a string")),
        ("description: [a]\n", names("description", "a string")),
        ("family: [a]\n", names("family", "a string")),
        ("extends: 3\n", names("extends", "a string", 3)),
        ("extends: qwen-image-lorra\n", names("qwen-image-lorra", "not a recipe")),
        ("extends: ../../etc/passwd\n", names("../../etc/passwd", "not a recipe")),
        ("extends: mine\n", names("mine", "not a recipe")),
    ],
)
def test_a_faulty_value_is_told(says, write, text, expected):
    (problem,) = load_recipe_file(write(text)).problems
    says([problem])
    assert problem.message == expected and "mine.yaml" in problem.message
    assert problem.wrong_use


@pytest.mark.parametrize("text", ["- a\n", "a: [\n", "a: 1\na: 2\n"])
def test_a_file_that_is_no_mapping_is_refused(write, text):
    with pytest.raises(DiffSynthError, match=r"mine\.yaml"):
        load_recipe_file(write(text))


@pytest.mark.parametrize("name", ["../recipes/qwen-image-lora", "qwen-image-lora.yaml", "Qwen-Image-LoRA", ""])
def test_only_the_name_of_a_recipe_names_it(name):
    with pytest.raises(FaultsFound, match="there is no recipe"):
        load_recipe(name)


def test_every_key_of_a_recipe_is_explained():
    assert list(RECIPE_KEYS) == ["extends", "description", "family", "parameters", "stages"]
    assert list(STAGE_KEYS) == ["description", "parameters"]
    assert all(RECIPE_KEYS.values()) and all(STAGE_KEYS.values())


STAGED = """
parameters:
  seed: 1
stages:
  high:
    description: the first
    parameters: {max_timestep_boundary: 0.4}
  low:
    parameters: {min_timestep_boundary: 0.4, seed: 2}
"""


def test_stages_stand_in_their_order_with_their_values(write):
    recipe = load_recipe_file(write(STAGED))
    assert recipe.problems == ()
    assert list(recipe.stages.items()) == [("high", "the first"), ("low", "")]
    values = {"high": {"max_timestep_boundary": 0.4}, "low": {"min_timestep_boundary": 0.4, "seed": 2}}
    assert recipe.layers == (Overrides({"seed": 1}, values),)
    assert recipe.parameters == {"seed": 1}


def test_a_recipe_inherits_stages_and_merges_them_by_name(write, monkeypatch):
    from diffsynth_core.config import recipes

    parent = write(STAGED, "parent.yaml")
    monkeypatch.setattr(recipes, "recipe_folder", lambda: parent.parent)
    monkeypatch.setattr(recipes, "recipe_names", lambda: ("parent",))
    text = "extends: parent\nstages:\n  last: {}\n  low:\n    description: the second\n    parameters: {lora_rank: 4}\n  high:\n"
    recipe = load_recipe_file(write(text))
    assert recipe.problems == ()
    assert list(recipe.stages.items()) == [("high", "the first"), ("low", "the second"), ("last", "")]
    high, low, last = resolve_stages({"config": str(write(text))})
    assert (high.parameters.max_timestep_boundary, high.parameters.seed, high.parameters.lora_rank) == (0.4, 1, 32)
    assert (low.parameters.min_timestep_boundary, low.parameters.seed, low.parameters.lora_rank) == (0.4, 2, 4)
    assert (last.parameters.min_timestep_boundary, last.parameters.seed) == (0.0, 1)


@pytest.mark.parametrize("text", ["stages:\n", "stages: {}\n"])
def test_no_stages_are_no_stages(write, text):
    recipe = load_recipe_file(write(text))
    assert dict(recipe.stages) == {} and recipe.problems == ()


def test_all_wrong_keys_of_stages_are_told_and_what_is_right_is_kept(says, write):
    path = write(
        "stages:\n"
        "  high:\n    description: 3\n    lora_rank: 4\n    about: x\n"
        "    parameters: {lora_rnk: 1, rehearse: true, only: low, seed: 7}\n"
        "  low: [1]\n"
        "  mid:\n    parameters: [seed]\n"
        "  End:\n    parameters: {sed: 1}\n"
        "  ../x: {}\n"
        "  5: {}\n"
    )
    recipe = load_recipe_file(path)
    says(recipe.problems)
    high, end = names(path, "stage `high`"), names(path, "stage `End`")
    folder_hint = names("lowercase letters")
    assert [(problem.message, problem.hint) for problem in recipe.problems] == in_any_order(
        (names(high, "description", "a string", 3), None),
        (names(high, "lora_rank", "not a key"), names("parameters:")),
        (names(high, "about", "not a key"), names("description, parameters")),
        (names("lora_rnk", high, "not a parameter"), names("lora_rank")),
        (names("rehearse", high, "single command"), "pass it as a flag"),
        (names("only", high, "single command"), "pass it as a flag"),
        (names(path, "stage `low`", "a list", "description and parameters"), None),
        (names(path, "stage `mid`", "parameters", "a list"), None),
        (names(path, "End", "stage name"), folder_hint),
        (names("sed", end, "not a parameter"), names("seed")),
        (names(path, "../x", "stage name"), folder_hint),
        (names(path, 5, "stage name"), folder_hint),
    )
    assert all(problem.wrong_use for problem in recipe.problems)
    assert list(recipe.stages) == ["high", "low", "mid"]
    assert recipe.layers[0].stages == {"high": {"seed": 7}, "low": {}, "mid": {}}


def test_stages_are_names_and_their_keys(says, write):
    path = write("stages: [high]\n")
    (problem,) = load_recipe_file(path).problems
    assert problem.message == names(path, "stages", "a list")
    says([problem])
    assert problem.wrong_use


def test_presets_of_accelerate_are_no_recipes():
    assert (recipe_folder() / "accelerate" / "ddp.yaml").is_file()
    assert not {"ddp", "accelerate/ddp"} & set(recipe_names())

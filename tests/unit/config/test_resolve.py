"""Origins of values, and that all their problems are reported together."""

from pathlib import Path

import pytest

from diffsynth_core.config.parameters import SETTINGS, Parameters
from diffsynth_core.config.recipes import NOT_IN_RECIPES, Overrides, Recipe
from diffsynth_core.config.resolve import resolve, resolve_stages
from tests.naming import in_any_order, names


def messages(resolved) -> list[str]:
    return [problem.message for problem in resolved.problems]


def test_without_anything_all_values_are_the_defaults():
    resolved = resolve({})
    assert resolved.parameters == Parameters()
    assert (resolved.family, resolved.problems, resolved.invalid, resolved.incomplete) == (None, (), frozenset(), False)
    assert not resolved.origin("lora_rank").is_given


@pytest.mark.parametrize(
    ("with_flag", "with_config", "with_recipe", "rank", "origin"),
    [
        (True, True, True, 4, "`--lora_rank`"),
        (False, True, True, 8, "`{config}`"),
        (False, False, True, 32, "recipe `qwen-image-lora`"),
        (True, False, True, 4, "`--lora_rank`"),
        (True, True, False, 4, "`--lora_rank`"),
        (False, True, False, 8, "`{config}`"),
        (False, False, False, 32, None),
    ],
)
def test_flags_go_before_the_file_before_the_recipe_before_the_default(
    config, with_flag, with_config, with_recipe, rank, origin
):
    path = config("parameters:\n  lora_rank: 8\n")
    flags = {"lora_rank": "4"} if with_flag else {}
    flags |= {"config": path} if with_config else {}
    flags |= {"recipe": "qwen-image-lora"} if with_recipe else {}
    resolved = resolve(flags)
    assert resolved.problems == ()
    assert resolved.parameters.lora_rank == rank
    assert str(resolved.origin("lora_rank")) == (origin.format(config=path) if origin else "the default")
    assert resolved.origin("lora_rank").is_given == bool(origin)


def test_each_value_comes_from_the_nearest_source_that_has_it(config):
    path = config("parameters:\n  lora_rank: 8\n  learning_rate: 3e-5\n")
    parameters = resolve({"recipe": "qwen-image-lora", "config": path, "lora_rank": "4"}).parameters
    assert (parameters.lora_rank, parameters.learning_rate, parameters.num_epochs, parameters.seed) == (4, 3e-5, 5, 0)
    assert parameters.recipe == "qwen-image-lora" and parameters.config == Path(path)


@pytest.mark.parametrize(
    ("flags", "text", "family"),
    [
        ({"recipe": "qwen-image-lora"}, None, "qwen-image"),
        ({}, "family: qwen-image\n", "qwen-image"),
        ({}, "extends: qwen-image-full\n", "qwen-image"),
        ({"recipe": "qwen-image-lora"}, "family: other\n", "other"),
        ({}, "parameters: {}\n", None),
    ],
)
def test_the_family_comes_from_the_file_or_the_recipe(config, flags, text, family):
    assert resolve({**flags, **({"config": config(text)} if text else {})}).family == family


@pytest.mark.parametrize(
    ("flags", "output"),
    [
        ({}, "models"),
        ({"recipe": "qwen-image-lora"}, "models/train/qwen-image-lora"),
        ({"recipe": "qwen-image-lora", "output_path": "here"}, "here"),
    ],
)
def test_a_recipe_has_an_output_folder_of_its_own(flags, output):
    resolved = resolve(flags)
    assert resolved.parameters.output_path == Path(output)
    assert resolved.origin("output_path").is_given == ("output_path" in flags)


def test_wrong_values_fall_back_to_the_default_and_are_told_once_each(says, config):
    path = config("parameters:\n  learning_rate: fast\n  seed: -1\n  model_paths: [1, [2, ''], 3]\n")
    resolved = resolve({"lora_rank": "many", "config": path, "num_epochs": "2", "recipe": "qwen-image-lora"})
    says(resolved.problems)
    assert sorted(messages(resolved)) == [
        names("learning_rate", "a number", "fast", path),
        names("lora_rank", "an integer", "many", "--lora_rank"),
        names("model_paths", "JSON list", '[1, [2, ""], 3]', path),
        names("seed", "an integer", "at least 0", "-1", path),
    ]
    assert all(problem.wrong_use for problem in resolved.problems)
    assert resolved.invalid == {"lora_rank", "learning_rate", "seed", "model_paths"}
    defaults = Parameters()
    assert {name: getattr(resolved.parameters, name) for name in resolved.invalid} == {
        name: getattr(defaults, name) for name in resolved.invalid
    }
    assert resolved.parameters.num_epochs == 2
    assert not resolved.incomplete


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lora_rank", "0", names("lora_rank", "an integer", "at least 1", 0, "--lora_rank")),
        ("max_grad_norm", "0", names("max_grad_norm", "a number", "more than 0", 0, "--max_grad_norm")),
        ("max_timestep_boundary", "1.5", names("max_timestep_boundary", "a number", "at most 1.0", "1.5", "--max_timestep_boundary")),
        ("caption_dropout", "1", names("caption_dropout", "a number", "less than 1.0", "--caption_dropout")),
        ("adam_betas", "0.9,1", names("adam_betas", "two comma-separated numbers", "less than 1", "0.9,1", "--adam_betas")),
        ("adam_betas", "0.9", names("adam_betas", "two comma-separated numbers", "0.9", "--adam_betas")),
        ("seed", str(2**63), names("seed", "an integer", "at most", 2**63 - 1, 2**63, "--seed")),
        ("mixed_precision", "fp8", names("mixed_precision", "no, bf16, fp16", "fp8", "--mixed_precision")),
        ("find_unused_parameters", "maybe", names("find_unused_parameters", "true or false", "maybe", "--find_unused_parameters")),
        ("model_paths", "a.safetensors", names("model_paths", "JSON list", "a.safetensors", "--model_paths")),
        ("learning_rate", "inf", names("learning_rate", "a number", "at most 1e+30", "inf", "--learning_rate")),
    ],
)  # fmt: skip
def test_a_wrong_value_says_what_is_taken_what_is_there_and_where(says, name, value, message):
    resolved = resolve({name: value})
    says(resolved.problems)
    assert messages(resolved) == [message]


@pytest.mark.parametrize(
    ("text", "shown"), [("true", "true"), ("null", "null"), ("[1]", "[1]"), ("{a: 1}", '{"a": 1}')]
)
def test_values_of_a_file_are_shown_as_they_stand_there(says, config, text, shown):
    resolved = resolve({"config": config(f"parameters:\n  lora_rank: {text}\n")})
    says(resolved.problems)
    assert messages(resolved) == [names("lora_rank", shown)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"height": "512"}, names("height", "without", "width")),
        ({"width": "512"}, names("width", "without", "height")),
        ({"min_timestep_boundary": "0.5", "max_timestep_boundary": "0.5"}, names("min_timestep_boundary", "0.5", "not below", "max_timestep_boundary", "0.5")),
        ({"min_timestep_boundary": "0.0001", "max_timestep_boundary": "0.0002"}, names("min_timestep_boundary")),
        ({"resume": "auto", "rehearse": True}, names("rehearse", "resume")),
        (
            {"task": "direct_distill", "min_timestep_boundary": "0.5"},
            names("min_timestep_boundary", "no effect", "direct_distill"),
        ),
        ({"task": "sft:train", "rehearse": True}, names("rehearse", "task", "sft:train")),
        ({"recipe": "qwen-image-lora", "num_frames": "17"}, names("num_frames", "not apply", "qwen-image", "wan", "--num_frames")),
    ],
)  # fmt: skip
def test_combinations_that_cannot_work_are_told(says, flags, message):
    (found,) = resolve(flags).problems
    says([found])
    assert found.message == message
    assert found.wrong_use and found.hint


@pytest.mark.parametrize(
    "flags",
    [
        {"height": "512", "width": "512"},
        {"num_frames": "81", "recipe": "qwen-image-lora"},
        {"fp8_models": ""},
        {"zero_cond_t": False},
        {"task": "sft"},
        {"resume": "auto"},
        {"min_timestep_boundary": "0.417", "max_timestep_boundary": "0.418"},
        {"num_frames": "17"},
    ],
)
def test_what_changes_nothing_or_works_is_not_told(flags):
    assert resolve(flags).problems == ()


def test_a_wrong_side_is_not_also_told_as_a_missing_one():
    assert len(resolve({"height": "tall", "width": "512"}).problems) == 1


def test_unknown_flags_and_keys_are_told_with_the_nearest_name(says, config):
    path = config("parameters:\n  lora_ranks: 8\n  learning_rat: 1\nextend: x\nseed: 3\n")
    resolved = resolve({"config": path, "num_epochs": "none"}, ("--lora_rnak", "--zzz"))
    says(resolved.problems)
    assert [(problem.message, problem.hint) for problem in resolved.problems] == in_any_order(
        (names("lora_rnak", "not a parameter"), names("lora_rank")),
        (names("zzz", "not a parameter"), names("diffsynth train --help")),
        (names("lora_ranks", path, "not a parameter"), names("lora_rank")),
        (names("learning_rat", path, "not a parameter"), names("learning_rate")),
        (names(path, "extend", "not a key"), names("extends", "description", "family", "parameters", "stages")),
        (names(path, "seed", "not a key"), names("parameters:")),
        (names("num_epochs", "an integer", "none", "--num_epochs"), None),
    )
    assert not resolved.incomplete


@pytest.mark.parametrize(
    ("flags", "message", "hint"),
    [
        ({"recipe": "qwen-image-lorra"}, names("no recipe", "qwen-image-lorra"), names("qwen-image-lora")),
        ({"recipe": "xyz"}, names("no recipe", "xyz"), names("diffsynth recipe list")),
        ({"config": "gone.yaml"}, names("cannot read", "gone.yaml"), "correct the path"),
    ],
)
def test_a_source_that_is_not_there_leaves_the_rest_incomplete(says, flags, message, hint):
    resolved = resolve(flags)
    assert resolved.incomplete
    says(resolved.problems[:1])
    assert resolved.problems[0].message == message and resolved.problems[0].hint == hint


def test_the_recipe_and_the_config_that_are_both_wrong_are_both_told(config):
    resolved = resolve({"recipe": "xyz", "config": config("parameters: [1]\n")})
    assert len(resolved.problems) == 2


PATHS = [name for name, setting in SETTINGS.items() if setting.type_name == "path"]


@pytest.mark.parametrize("name", PATHS)
def test_an_empty_text_is_no_path(name):
    (problem,) = resolve({name: ""}).problems  # pathlib would make it the working folder
    assert problem.message == names(name, "a path", "``", f"--{name}") and problem.wrong_use


@pytest.mark.parametrize("name", [name for name in PATHS if name not in NOT_IN_RECIPES])
def test_an_empty_text_in_a_file_is_no_path_either(config, name):
    (message,) = messages(resolve({"config": config(f"parameters:\n  {name}: ''\n")}))
    assert message == names(name, "a path", "``")


@pytest.mark.parametrize("name", ["output_path", "lora_rank", "lora_base_model", "trainable_models"])
def test_a_flag_that_was_taken_for_a_value_is_told(says, name):
    (problem,) = resolve({name: "--num_epochs"}).problems
    says([problem])
    assert problem.message == names(name, "--num_epochs")
    assert problem.hint == names(f"--{name} VALUE")


@pytest.mark.parametrize(
    ("recipe", "config_text", "flags", "lora_format", "align"),
    [
        (None, None, {"align": "true"}, "kohya", True),
        (None, None, {"align": "false"}, "diffsynth", False),
        ({"align": True}, None, {}, "kohya", True),
        ({"align": True}, None, {"format": "diffusers"}, "diffusers", False),
        ({"align": True}, None, {"format": "kohya"}, "kohya", False),
        ({"align": True}, "lora_format: comfyui", {}, "comfyui", False),
        ({"align": True}, "lora_format: comfyui", {"align": "true"}, "kohya", True),
        ({"align": True}, None, {"align": "false"}, "diffsynth", False),
        ({"align": True}, "align_to_opensource_format: false", {}, "diffsynth", False),
        ({"align": True}, "align_to_opensource_format: false", {"align": "true"}, "kohya", True),
        ({"align": True}, None, {"align": "false", "format": "diffusers"}, "diffusers", False),
        ({"format": "diffusers"}, None, {"align": "true"}, "kohya", True),
        ({"format": "diffusers"}, None, {"align": "false"}, "diffusers", False),
        ({"format": "kohya"}, None, {"align": "false"}, "kohya", False),
        ({"format": "diffusers"}, "align_to_opensource_format: true", {"align": "false"}, "diffusers", False),
        (None, "lora_format: diffusers", {"align": "true"}, "kohya", True),
        (None, None, {"align": "true", "format": "kohya"}, "kohya", True),
    ],
)
def test_the_nearer_spelling_of_the_lora_s_format_goes(
    config, monkeypatch, recipe, config_text, flags, lora_format, align
):
    spelt = {"align": "align_to_opensource_format", "format": "lora_format"}
    given = {spelt[name]: value for name, value in flags.items()}
    if recipe:
        values = {spelt[name]: value for name, value in recipe.items()}
        loaded = Recipe("aligned", "", "flux", (Overrides({"lora_rank": 8}), Overrides(values)))
        monkeypatch.setattr("diffsynth_core.config.resolve.load_recipe", lambda name: loaded)
        given["recipe"] = "aligned"
    if config_text:
        given["config"] = config(f"parameters:\n  {config_text}\n")
    resolved = resolve(given)
    assert messages(resolved) == []
    assert resolved.parameters.lora_format == lora_format
    assert resolved.parameters.align_to_opensource_format is align


def test_a_stage_and_a_file_that_extends_another_are_nearer(config, monkeypatch):
    path = config(
        "parameters: {align_to_opensource_format: true}\n"
        "stages:\n  one: {parameters: {lora_format: diffusers}}\n  two: {parameters: {lora_rank: 8}}\n"
    )
    one, two = resolve_stages({"config": path})
    assert (one.problems, one.parameters.lora_format, two.parameters.lora_format) == ((), "diffusers", "kohya")
    assert str(two.origin("lora_format")) == f"`{path}`"

    layers = (Overrides({"align_to_opensource_format": True}), Overrides({"lora_format": "diffusers"}))
    extended = Recipe("extended", "", "flux", layers)
    monkeypatch.setattr("diffsynth_core.config.resolve.load_recipe", lambda name: extended)
    resolved = resolve({"recipe": "extended"})
    assert (resolved.problems, resolved.parameters.lora_format) == ((), "diffusers")


@pytest.mark.parametrize("by_flags", [True, False])
def test_two_spellings_in_one_place_must_agree(says, config, by_flags):
    values = {"align_to_opensource_format": "true", "lora_format": "diffusers"}
    path = config("parameters: {align_to_opensource_format: true, lora_format: diffusers}\n")
    resolved = resolve(values if by_flags else {"config": path})
    origin = "command line" if by_flags else f"`{path}`"
    says(resolved.problems)
    assert messages(resolved) == [
        names("align_to_opensource_format", "lora_format", "kohya", "lora_format", "diffusers", origin)
    ]
    assert resolved.problems[0].hint == "remove one of them" and resolved.problems[0].wrong_use


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"align_to_opensource_format": "maybe"}, names("align_to_opensource_format", "true or false", "maybe")),
        ({"align_to_opensource_format": "true", "lora_format": "kohja"}, names("lora_format", "kohja")),
    ],
)
def test_a_wrong_value_of_either_spelling_is_told_once(says, flags, expected):
    resolved = resolve(flags)
    says(resolved.problems)
    assert messages(resolved) == [expected]


CHECKPOINTING = "use_gradient_checkpointing"


@pytest.mark.parametrize(
    ("family", "given", "value", "of_family"),
    [
        ("wan", "", True, (CHECKPOINTING,)),
        ("wan", f"  {CHECKPOINTING}: false", False, ()),
        ("wan", f"  {CHECKPOINTING}: true", True, ()),
        ("qwen-image", "", False, ()),
    ],
)
def test_a_family_may_have_a_default_of_its_own(config, family, given, value, of_family):
    resolved = resolve({"config": config(f"family: {family}\nparameters:\n  lora_rank: 4\n{given}\n")})
    assert (resolved.parameters.use_gradient_checkpointing, resolved.family_defaults) == (value, of_family)
    assert resolved.origin(CHECKPOINTING).is_given == bool(given) and not resolved.problems


def test_a_flag_goes_over_the_default_of_a_family(config):
    resolved = resolve({"config": config("family: wan\nparameters:\n  lora_rank: 4\n"), CHECKPOINTING: False})
    assert not resolved.parameters.use_gradient_checkpointing and not resolved.family_defaults

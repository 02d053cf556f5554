"""`--only` and recipes with stages on the command line: what is rejected, and how often it is reported."""

import pytest

from tests.naming import in_any_order, names

STAGED = """
extends: qwen-image-lora
stages:
  high:
    parameters: {max_timestep_boundary: 0.4}
  low:
    parameters: {min_timestep_boundary: 0.4}
"""
ONE_OF_THEM = names("--only")


@pytest.fixture
def staged(config):
    return config(STAGED)


@pytest.mark.parametrize(("only", "hint"), [("hihg", names("high")), ("zzz", names("high, low"))])
def test_an_unknown_stage(refuse, staged, only, hint):
    printed = refuse("--config", staged, "--only", only, recipe=None)
    assert printed == (2, [(names("no stage", only, "--only"), hint)])


def test_only_without_stages(refuse):
    message = names("only", "high", "no stages")
    assert refuse("--only", "high") == (2, [(message, names("remove it", "recipe with stages"))])


def test_one_flag_for_stages_that_differ(refuse, staged):
    printed = refuse("--config", staged, "--max_timestep_boundary", 0.5, "--min-timestep-boundary", 0.2, recipe=None)
    assert printed == (
        2,
        [
            (names("max_timestep_boundary", "high and low", "--max_timestep_boundary"), ONE_OF_THEM),
            (names("min_timestep_boundary", "high and low", "--min_timestep_boundary"), ONE_OF_THEM),
        ],
    )


def test_one_flag_for_the_stage_that_is_named(cli, staged, dataset):
    outcome = cli(
        "train", "--config", staged, "--dataset_base_path", dataset, "--max_timestep_boundary", 0.5, "--only", "high", "--dry_run"
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert [line for line in lines if line.startswith("Stage ")] == ["Stage high"]
    assert "Output    `models/train/config/high`" in lines


def test_problems_of_both_stages_come_in_one_report_and_common_ones_once(refuse, config):
    path = config(STAGED + "  last:\n    parameters: {lora_target_modules: to_qq}\n")
    code, problems = refuse(
        "--config", path, "--lora_rnk", 16, "--dataset_base_path", "nowhere", "--seed", "x", recipe=None
    )
    assert code == 2
    assert problems == in_any_order(
        (names("lora_rnk", "not a parameter"), names("lora_rank")),
        (names("seed", "an integer", "x", "--seed"), None),
        (names("stage last", "lora_target_modules", "no module", "dit", "to_qq"), names("to_q")),
        (names("nowhere", "dataset_base_path", "does not exist"), names("--dataset_base_path")),
    )


def test_the_dry_run_shows_the_plan_of_each_stage(cli, staged, dataset):
    outcome = cli("train", "--config", staged, "--dataset_base_path", dataset, "--output_path", "out", "--dry_run")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert [line for line in lines if line.startswith(("Stage ", "Output "))] == [
        "Stage high",
        "Output    `out/high`",
        "Stage low",
        "Output    `out/low`",
    ]


@pytest.mark.parametrize("file", ["high", "low"])
def test_the_real_recipe_takes_only_a_stage_of_its_own(parse, file):
    resolved = parse("--recipe", "wan2.2-t2v-a14b-lora", "--only", file, "--learning_rate", "3e-4")
    assert (resolved.stage, resolved.parameters.learning_rate, resolved.problems) == (file, 3e-4, ())
    assert str(resolved.parameters.output_path) == f"models/train/wan2.2-t2v-a14b-lora/{file}"
    (entry, *_) = resolved.parameters.model_id_with_origin_paths
    assert entry == f"Wan-AI/Wan2.2-T2V-A14B:{file}_noise_model/diffusion_pytorch_model*.safetensors"


def test_the_model_files_of_one_expert_are_not_for_both(parse_stages):
    stages = parse_stages("--recipe", "wan2.2-t2v-a14b-lora", "--model_id_with_origin_paths", "a/b:c")
    for resolved in stages:
        (problem,) = resolved.problems
        assert problem.message == names("model_id_with_origin_paths", "high and low")

"""Which engine accelerate's launcher, or a configuration for it, asks for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from diffsynth_core.config.origins import DEFAULT, Stated
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.recipes import launcher_presets
from diffsynth_core.config.resolve import resolve, with_values_of_launcher
from diffsynth_core.errors import Problem, collect_problems
from diffsynth_core.planning.machine.engines import (
    ENGINES,
    EngineChoice,
    EngineName,
    engine_of_configuration,
    engine_of_environment,
    engine_problems,
)
from diffsynth_core.planning.training.optimizer_choice import choose_optimizer

LOCAL = {"compute_environment": "LOCAL_MACHINE", "num_processes": 2, "mixed_precision": "bf16", "machine_rank": 0}
CONFIGURATIONS = {
    "ddp": {"distributed_type": "MULTI_GPU"},
    "fsdp2": {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}},
    "fsdp2 offload": {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True}},
    "fsdp2 whole weights": {
        "distributed_type": "FSDP",
        "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": False},
    },
    "zero1": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 1}},
    "zero2 offload": {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"zero_stage": 2, "offload_optimizer_device": "cpu", "offload_param_device": "cpu"},
    },
    "zero3 offload": {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"zero_stage": 3, "offload_optimizer_device": "none", "offload_param_device": "cpu"},
    },
}
CHOICES = {
    "ddp": EngineChoice(),
    "fsdp2": EngineChoice(name="fsdp2"),
    "fsdp2 offload": EngineChoice(name="fsdp2", offload_optimizer=True, offload_weights=True),
    "fsdp2 whole weights": EngineChoice(name="fsdp2", reshards=False),
    "zero1": EngineChoice(name="zero1"),
    # the reference's own files offload weights in stage 2 as well, where they are not divided
    "zero2 offload": EngineChoice(name="zero2", offload_optimizer=True),
    "zero3 offload": EngineChoice(name="zero3", offload_weights=True),
}


def launched_with(path: Path) -> dict[str, str]:
    """The environment that accelerate's launcher makes of a configuration file."""
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ""  # set by the launcher's command
    if arguments.use_deepspeed:
        return dict(prepare_deepspeed_cmd_env(arguments)[1])
    return dict(prepare_multi_gpu_env(arguments))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_and_the_environment_that_the_launcher_makes_of_it_ask_for_the_same_engine(name, tmp_path):
    path = tmp_path / "accelerate.yaml"
    settings = LOCAL | CONFIGURATIONS[name]
    path.write_text(yaml.safe_dump(settings))
    for choice in (engine_of_configuration(settings, str(path)), engine_of_environment(launched_with(path))):
        assert replace(choice, stated=()) == CHOICES[name]
        assert [(stated.name, stated.value) for stated in choice.stated] == [("mixed_precision", "bf16")]


DEEPSPEED = {"zero_stage": 2, "gradient_accumulation_steps": 4, "gradient_clipping": 0.5}


def resolved_with(stated: tuple[Stated, ...], **flags: object):
    return with_values_of_launcher(resolve({"recipe": "qwen-image-full-80gb", **flags}), stated)


def test_a_configuration_goes_before_the_recipe_and_flags_before_both(tmp_path):
    path = tmp_path / "accelerate.yaml"
    settings = LOCAL | {"distributed_type": "DEEPSPEED", "deepspeed_config": DEEPSPEED, "mixed_precision": "fp16"}
    path.write_text(yaml.safe_dump(settings))
    for choice in (engine_of_configuration(settings, str(path)), engine_of_environment(launched_with(path))):
        resolved = resolved_with(choice.stated)
        found = resolved.parameters
        assert (found.mixed_precision, found.gradient_accumulation_steps, found.max_grad_norm) == ("fp16", 4, 0.5)
        assert resolved.origin("max_grad_norm").kind == "launcher" and not resolved.warnings
        flags = {"mixed_precision": "bf16", "gradient_accumulation_steps": "2", "max_grad_norm": "0.5"}
        overruled = resolved_with(choice.stated, **flags)
        found = overruled.parameters
        assert (found.mixed_precision, found.gradient_accumulation_steps, found.max_grad_norm) == ("bf16", 2, 0.5)
        source = choice.stated[0].source
        assert [warning.message for warning in overruled.warnings] == [
            f"`gradient_accumulation_steps` is `2` (`--gradient_accumulation_steps`), which takes precedence over `4` ({source})",
            f"`mixed_precision` is `bf16` (`--mixed_precision`), which takes precedence over `fp16` ({source})",
        ]


@pytest.mark.parametrize("automatic", [{}, dict.fromkeys(("gradient_accumulation_steps", "gradient_clipping"), "auto")])
def test_what_a_configuration_leaves_open_is_that_of_the_run(tmp_path, automatic):
    """`no` and 1 are what `accelerate config` writes unasked, and its launcher says of a file without them."""
    unasked = {"gradient_accumulation_steps": 1, "gradient_clipping": "none"}
    path = tmp_path / "accelerate.yaml"
    deepspeed = {"zero_stage": 2, **(automatic or unasked)}
    settings = LOCAL | {"distributed_type": "DEEPSPEED", "deepspeed_config": deepspeed, "mixed_precision": "no"}
    path.write_text(yaml.safe_dump(settings))
    assert engine_of_configuration(settings, str(path)).stated == ()
    assert engine_of_environment(launched_with(path)).stated == ()


def test_a_value_that_no_parameter_takes_is_a_problem_with_its_configuration():
    resolved = resolved_with((Stated("mixed_precision", "fp8", "`a.yaml`"),))
    (problem,) = resolved.problems
    assert "got `fp8` (`a.yaml`)" in problem.message and problem.wrong_use
    assert resolved.parameters.mixed_precision == "bf16" and "mixed_precision" in resolved.invalid


def test_a_configuration_file_of_deepspeed_counts(tmp_path):
    path = tmp_path / "zero.json"
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "cpu"}}
    zero |= {"reduce_bucket_size": 5e7, "stage3_prefetch_bucket_size": "auto"}
    path.write_text(json.dumps({"zero_optimization": zero, "train_batch_size": "auto", "bf16": {"enabled": True}}))
    settings = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": str(path)}}
    wanted = EngineChoice(
        name="zero3",
        offload_optimizer=True,
        offload_weights=True,
        stated=(Stated("mixed_precision", "bf16", f"`{path}`"),),
        tuning=(("reduce_bucket_size", 5e7),),
    )
    assert engine_of_configuration(settings, "x") == wanted
    variables = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    assert engine_of_environment(variables) == wanted


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"distributed_type": "MEGATRON_LM"}, "Megatron-LM"),
        ({"distributed_type": "FSDP"}, "version 1 of FSDP"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 0}}, "stage 0"),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3, "offload_param_device": "nvme"}},
            "nvme",
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "/no/such.json"}},
            "such.json",
        ),
    ],
)
def test_what_no_engine_here_does_is_a_problem(settings, what):
    (problem,) = engine_of_configuration(settings, "accelerate.yaml").problems
    assert what in problem.message and problem.hint and problem.wrong_use


def problems_of(name: EngineName, flags: dict[str, object]) -> list[Problem]:
    """Why a run with these parameters cannot train with an engine."""
    parameters = Parameters.model_validate(flags)
    with collect_problems() as problems:
        optimizer = choose_optimizer(parameters, DEFAULT, frozenset())
    assert not problems
    return list(engine_problems(parameters, optimizer, parameters.mixed_precision or "no", EngineChoice(name=name)))


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "replicated"])
@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ({"fused_backward": True}, "fused_backward"),
        ({"enable_optimizer_cpu_offload": True}, "enable_optimizer_cpu_offload"),
        ({"optimizer": "muon"}, "optimizer"),
        ({"mixed_precision": "fp16"}, "fp16"),
    ],
)
def test_what_parts_of_tensors_cannot_be_trained_with_is_refused(name, flags, what):
    found = problems_of(name, flags)
    assert [problem for problem in found if what in problem.message and problem.wrong_use]


@pytest.mark.parametrize(
    ("name", "flags", "what"),
    [
        ("zero3", {"trained_dtype": "bf16", "mixed_precision": "bf16"}, "trained_dtype"),
        ("zero3", {"compile": True}, "compile"),
        ("fsdp2", {"compile": True}, "compile"),
        ("zero3", {"checkpointing": "nested"}, "nested"),
    ],
)
def test_what_some_of_them_cannot_train_with_is_refused(name, flags, what):
    (problem,) = problems_of(name, flags)
    assert what in problem.message and problem.wrong_use
    assert not problems_of(name, {})


def test_an_optimizer_of_deepspeed_is_refused(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}))
    settings = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": str(path)}}
    (problem,) = engine_of_configuration(settings, "x").problems
    assert "`optimizer`" in problem.message and problem.wrong_use


def test_deepspeed_that_is_not_installed_is_a_problem_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = problems_of("zero2", {})
    assert "deepspeed" in problem.message and problem.hint == "`pip install 'diffsynth-cli[deepspeed]'`"


def test_presets_are_engines_that_exist():
    found = {
        name: engine_of_configuration(yaml.safe_load(path.read_text()), name)
        for name, path in launcher_presets().items()
    }
    assert not any(choice.problems for choice in found.values())
    assert {name: choice.name for name, choice in found.items() if name.startswith("z")} == {
        "zero2": "zero2",
        "zero2offload": "zero2",
        "zero3": "zero3",
    }


def test_what_deepspeed_is_told_and_nobody_here_does_is_a_problem(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 8}, "compression": {}}))
    settings = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": str(path)}}
    (problem,) = engine_of_configuration(settings, "x").problems
    assert "`compression`, `zero_optimization.zero_hpz_partition_size`" in problem.message and problem.wrong_use

"""Optimizers and arguments that cannot work: one problem each, before anything is loaded."""

import sys

import pytest

from diffsynth_core.config.origins import Origin
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import collect_problems
from diffsynth_core.planning.training.optimizer_choice import choose_optimizer
from diffsynth_core.planning.training.optimizers import OPTIMIZERS
from tests.naming import names

CASES = [
    (("--optimizer", "adamw8bits"), names("there is no optimizer", "adamw8bits"), names("adamw8bit")),
    (("--optimizer", "sgd"), names("there is no optimizer", "sgd"), names("adamw", "prodigy", "package.module.Class")),
    (
        ("--optimizer", "lion", "--optimizer_args", "d_coef=2 use_gc=true"),
        names("lion", "d_coef", "use_gc"),
        names("betas", "weight_decay"),
    ),
    (("--optimizer_args", "eps=-1"), names("eps", "adamw", "a number of at least 0", "-1"), None),
    (("--optimizer_args", "betas=0.9"), names("betas", "adamw", "2 comma-separated values", "0.9"), None),
    (("--optimizer_args", "fused=yes"), names("fused", "true or false", "yes"), None),
    (("--optimizer", "muon", "--optimizer_args", "ns_steps=100"), names("ns_steps", "1 to 99", "100"), None),
    (("--optimizer_args", "lr=0.1"), names("lr", "learning_rate"), names("--learning_rate 0.1")),
    (("--optimizer", "lion", "--adam_betas", "0.9,0.99"), names("adam_betas", "lion"), names("--optimizer_args betas=")),
    (("--optimizer", "adafactor", "--adam_betas", "0.9,0.99"), names("adam_betas", "adafactor"), names("remove it")),
    (
        ("--weight_decay", 0.1, "--optimizer_args", "weight_decay=0.2"),
        names("weight_decay", "set twice", "weight_decay", "optimizer_args"),
        names("remove one"),
    ),
    (("--optimizer", "no_such_package.Best"), names("no_such_package.Best", "cannot be imported"), names("adamw")),
    (("--optimizer", "torch.optim.Best"), names("torch.optim.Best", "torch.optim", "has no", "Best"), names("adamw")),
    (("--optimizer", "collections.OrderedDict"), names("collections.OrderedDict", "subclass of", "torch.optim.Optimizer"), names("adamw")),
    (("--customized_optimizer", "torch.optim.LBFGS"), names("torch.optim.LBFGS", "evaluates the model"), names("adamw")),
    (
        ("--optimizer", "pytorch_optimizer.ScheduleFreeAdamW"),
        names("pytorch_optimizer.ScheduleFreeAdamW", "other weights", "evaluation", "checkpoints"),
        names("adamw"),
    ),
    (
        ("--optimizer", "torch.optim.NAdam", "--optimizer_args", "gamma=1"),
        names("torch.optim.NAdam", "gamma"),
        names("betas", "momentum_decay"),
    ),
    (
        ("--optimizer", "torch.optim.NAdam", "--optimizer_args", "eps=-1"),
        names("torch.optim.NAdam", "cannot be created", "eps=-1", "ValueError"),
        names("--optimizer_args"),
    ),
    (("--optimizer", "torch.optim.Rprop", "--weight_decay", 0.1), names("weight_decay", "torch.optim.Rprop"), names("remove it")),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "message", "hint"), CASES)
def test_it_is_one_problem(refuse, flags, message, hint):
    code, problems = refuse(*flags)
    assert code == 2
    assert problems == [(message, hint)]


FULL = ("--lora_base_model", "", "--trainable_models", "dit", "--mixed_precision", "bf16", "--trained_dtype", "bf16")


@pytest.mark.parametrize(
    ("flags", "message", "hint"),
    [
        (("--trained_dtype", "bf16", "--mixed_precision", "bf16"), names("trained_dtype", "bf16", "LoRA", "float32"), names("remove it")),
        ((*FULL, "--mixed_precision", "no"), names("trained_dtype", "bf16", "mixed_precision", "float32"), names("--mixed_precision bf16")),
        ((*FULL, "--optimizer", "prodigy"), names("trained_dtype", "bf16", "prodigy"), names("--trained_dtype float32", "adamw", "muon")),
        ((*FULL, "--optimizer", "torch.optim.NAdam"), names("trained_dtype", "bf16", "torch.optim.NAdam"), names("adafactor")),
    ],
)  # fmt: skip
def test_weights_that_cannot_train_in_bf16(refuse, flags, message, hint):
    code, problems = refuse(*flags, recipe="qwen-image-full" if "--trainable_models" in flags else "qwen-image-lora")
    assert (code, problems) == (2, [(message, hint)])


def test_a_dry_run_plans_bf16_for_a_gpu_and_a_run_needs_one(cli, photographs):
    """Unless the command names the device; it is the machine that lacks one, not the command that is wrong."""
    command = ("train", "--recipe", "qwen-image-full", "--trained_dtype", "bf16", "--dataset_base_path", photographs)
    planned = cli(*command, "--dry_run")
    assert planned.code == 0 and "GPU in bf16" in planned.out
    needs = "error: `trained_dtype` `bf16` needs `mixed_precision` bf16, but the run computes in float32"
    for flags in ((), ("--dry_run", "--device", "cpu")):
        refused = cli(*command, *flags)
        assert (refused.code, needs in refused.err) == (1, True), flags
    assert cli(*command, "--dry_run", "--mixed_precision", "no").code == 2


@pytest.mark.parametrize("name", [name for name, spec in OPTIMIZERS.items() if spec.package])
def test_a_missing_package_is_named_with_the_command_that_installs_it(refuse, monkeypatch, name):
    package = OPTIMIZERS[name].package
    assert package
    monkeypatch.setitem(sys.modules, package.module, None)
    code, problems = refuse("--optimizer", name)
    install = f"pip install 'diffsynth-cli[{package.extra}]'"
    assert (code, problems) == (1, [(names(name, package.name, "not installed"), names(install))])


def test_both_names_in_one_file(refuse, config):
    path = config("parameters:\n  optimizer: lion\n  customized_optimizer: torch.optim.NAdam\n")
    code, problems = refuse("--config", path)
    assert (code, problems) == (2, [(names("customized_optimizer", path, "optimizer"), "remove one")])


def test_a_recipe_names_no_code():
    parameters = Parameters.model_validate({"optimizer": "torch.optim.NAdam"})
    for kind, refused in (("recipe", 1), ("config", 0), ("flag", 0)):
        with collect_problems() as problems:
            choice = choose_optimizer(parameters, Origin(kind, "recipe `x`"), frozenset())
        assert len(problems) == refused and choice.is_class == (not refused)


def test_a_rate_that_would_hardly_train_is_a_warning(cli, dataset, says):
    for name in ("prodigy", "adafactor", "adamw"):
        outcome = cli("train", "--recipe", "qwen-image-lora", "--dataset_base_path", dataset, "--dry_run",
                      "--device", "cpu", "--optimizer", name)  # fmt: skip
        warned = [line for line in outcome.out.splitlines() if "learning_rate" in line and line.startswith("warning")]
        assert warned == ([names("learning_rate", "0.0001", name)] if name != "adamw" else [])
        if warned:
            says("\n".join(warned))


def test_values_in_a_file(cli, dataset, config):
    """A mapping there, and the words of a command line, mean the same."""
    path = config("parameters:\n  customized_optimizer: adamw\n  optimizer_args: {betas: [0.9, 0.99], fused: true}\n")
    outcome = cli("train", "--recipe", "qwen-image-lora", "--config", path, "--dataset_base_path", dataset, "--dry_run",
                  "--device", "cpu", "--verbose")  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "betas=0.9, 0.99 fused=true" in outcome.out

"""Every optimizer of the table: it learns, resumes to the bit, and its state takes the bytes that the table says."""

import hashlib
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from diffsynth_core.checkpoints.saved_states import OPTIMIZER, LoopState, find_states
from diffsynth_core.checkpoints.state import restore_state, save_state, state_of
from diffsynth_core.config.origins import DEFAULT
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.errors import collect_problems
from diffsynth_core.planning.memory.fit_options import OTHER_OPTIMIZERS
from diffsynth_core.planning.training.optimizer_choice import (
    OptimizerChoice,
    choose_optimizer,
    rate_warnings,
    with_kernel,
)
from diffsynth_core.planning.training.optimizers import OPTIMIZERS
from diffsynth_core.weights.headers import read_header

SHAPES = {"lora_A": (4, 48), "lora_B": (40, 4), "matrix": (96, 50), "bias": (96,), "conv": (6, 3, 2, 2, 1)}
"""Of trained tensors; `matrix` is large enough for an 8-bit state, with a last block that is not full."""
RATES = {"prodigy": 1.0, "pytorch_optimizer.Prodigy": 1.0, "adafactor": 0.05}
CASES = {
    **{name: OptimizerChoice(name, {"weight_decay": 0.01}) for name in OPTIMIZERS},
    "adamw fused": OptimizerChoice("adamw", {"fused": True}),
    "adamw amsgrad": OptimizerChoice("adamw", {"amsgrad": True}),
    "adamw8bit without small tensors": OptimizerChoice("adamw8bit", {"min_8bit_size": 0}),
    "class": OptimizerChoice("torch.optim.NAdam", {"betas": (0.8, 0.9)}),
    "class with tensors in its group": OptimizerChoice("pytorch_optimizer.Prodigy", {}),
}


GOAL = 7
"""Seed of the weights that training goes to; those at its start have others, and a LoRA whose B is zero."""


def trained(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if seed != GOAL:
        values["lora_B"].zero_()
    return {name: nn.Parameter(value) for name, value in values.items()}


def build(choice: OptimizerChoice, weights: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    return choice.build(RATES.get(choice.name, 0.01), iter(weights.values()))


def take_steps(weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, first: int, count: int) -> None:
    """Descend towards other weights, with noise that is that of the step."""
    goal = trained(GOAL)
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(100 + step)
        for name, weight in weights.items():
            noise = torch.randn(weight.shape, generator=generator)
            weight.grad = weight.detach() - goal[name].detach() + 0.1 * noise
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def tensors_of(optimizer: torch.optim.Optimizer, weights: dict[str, nn.Parameter]) -> Iterator[Tensor]:
    """The tensors of a state but for counters, which have no dimensions."""
    for weight in weights.values():
        yield from (value for value in optimizer.state[weight].values() if isinstance(value, Tensor) and value.dim())


def save(folder, weights, optimizer, step: int) -> None:
    save_state(folder, LoopState(step, step, {}), state_of(weights, optimizer), keep=1)


def restore(folder, weights, optimizer) -> None:
    def hashes(paths):
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]

    found = find_states(folder, "", hashes).newest
    assert found
    restore_state(found.path, found.loop_state, weights, optimizer)


@pytest.mark.parametrize("choice", CASES.values(), ids=CASES)
def test_a_resumed_run_ends_as_one_that_never_stopped(tmp_path, choice):
    through = trained()
    optimizer = build(choice, through)
    take_steps(through, optimizer, 0, 4)
    save(tmp_path, through, optimizer, 4)
    take_steps(through, optimizer, 4, 4)
    resumed = trained(seed=1)
    other = build(choice, resumed)
    restore(tmp_path, resumed, other)
    take_steps(resumed, other, 4, 4)
    assert all(torch.equal(through[name], resumed[name]) for name in SHAPES)
    save(tmp_path / "one", through, optimizer, 8)
    save(tmp_path / "other", resumed, other, 8)
    one, two = ((tmp_path / name / "state/step-8" / OPTIMIZER).read_bytes() for name in ("one", "other"))
    assert one == two


@pytest.mark.parametrize("choice", CASES.values(), ids=CASES)
def test_the_state_takes_what_the_table_says(tmp_path, choice):
    """In memory and on disk; of a class from outside nothing is known."""
    weights = trained()
    optimizer = build(choice, weights)
    take_steps(weights, optimizer, 0, 2)
    expected = choice.state_bytes(SHAPES.values())
    memory = sum(value.nbytes for value in tensors_of(optimizer, weights))
    save(tmp_path, weights, optimizer, 2)
    saved = read_header(tmp_path / "state/step-2" / OPTIMIZER).tensors.values()
    disk = sum(entry.nbytes for entry in saved if entry.shape)
    assert choice.is_class or (memory, disk) == (expected, expected)


@pytest.mark.parametrize("choice", CASES.values(), ids=CASES)
def test_it_gets_nearer_to_the_goal(choice):
    weights, goal = trained(), trained(GOAL)
    start = {name: (weights[name] - goal[name]).norm().detach() for name in SHAPES}
    take_steps(weights, build(choice, weights), 0, 40)
    assert all((weights[name] - goal[name]).norm() < 0.999 * start[name] for name in SHAPES)


def test_muon_updates_matrices_and_adamw_the_rest():
    """As each of them does alone; matrices with the scale for which the learning rate of AdamW holds."""
    weights, alone = trained(), trained()
    take_steps(weights, build(OptimizerChoice("muon", {"weight_decay": 0.1, "betas": (0.8, 0.9)}), weights), 0, 3)
    matrices = [alone[name] for name in ("lora_A", "lora_B", "matrix")]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([alone["bias"], alone["conv"]], lr=0.01, weight_decay=0.1, betas=(0.8, 0.9))
    for step in range(3):
        before = {name: weight.detach().clone() for name, weight in alone.items()}
        take_steps(alone, muon, step, 1)
        kept = {name: alone[name].detach().clone() for name in ("lora_A", "lora_B", "matrix")}
        for name, value in before.items():
            alone[name].data.copy_(value)
        take_steps(alone, adamw, step, 1)
        for name, value in kept.items():
            alone[name].data.copy_(value)
    assert all(torch.equal(weights[name], alone[name]) for name in SHAPES)


@pytest.mark.parametrize("names", [("matrix",), ("bias",)])
def test_muon_needs_neither_matrices_nor_others(names):
    weights = {name: weight for name, weight in trained().items() if name in names}
    optimizer = build(OptimizerChoice("muon", {"weight_decay": 0.0}), weights)
    weights[names[0]].grad = torch.ones_like(weights[names[0]])
    optimizer.step()
    assert len(optimizer.param_groups) == 1 and optimizer.state[weights[names[0]]]


def test_an_elementwise_optimizer_updates_a_part_as_in_the_whole():
    """What engines that shard rely on; each row that claims it, and one that does not."""
    for name in [*(name for name, spec in OPTIMIZERS.items() if spec.elementwise), "adafactor"]:
        whole, part = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(3, 4))
        gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        for weight, given in ((whole, gradient), (part, gradient[:3])):
            optimizer = OptimizerChoice(name, {}).build(0.1, [weight])
            for _ in range(3):
                weight.grad = given.clone()
                optimizer.step()
        assert torch.equal(whole[:3], part) == OPTIMIZERS[name].elementwise, name


@pytest.mark.parametrize(
    ("optimizer", "device", "precision", "recorded", "fused"),
    [
        (OptimizerChoice(), "cuda", "bf16", None, True),
        (OptimizerChoice(), "cuda:1", "no", None, True),
        (OptimizerChoice(), "cuda", "fp16", None, False),
        (OptimizerChoice(), "cpu", "bf16", None, False),
        (OptimizerChoice(), "mps", "bf16", None, False),
        (OptimizerChoice(), "cuda", "bf16", False, False),
        (OptimizerChoice(), "cpu", "no", True, True),
        (OptimizerChoice("adamw", {"fused": False}), "cuda", "bf16", None, False),
        (OptimizerChoice("adamw", {"fused": True}), "cpu", "no", None, True),
        (OptimizerChoice("adafactor"), "cuda", "bf16", None, False),
        (OptimizerChoice("muon"), "cuda", "bf16", None, False),
        (OptimizerChoice("torch.optim.Adam"), "cuda", "bf16", None, False),
    ],
)
def test_the_kernel_is_fused_on_cuda_unless_arguments_or_the_run_to_resume_say(
    optimizer, device, precision, recorded, fused
):
    chosen = with_kernel(optimizer, device, precision, recorded=recorded)
    assert chosen.fused == fused and chosen.name == optimizer.name
    assert recorded or chosen == optimizer or not with_kernel(optimizer, device, precision, sharded=True).fused
    if fused:
        assert chosen.update_bytes([(3, 4)], "cuda") == 0 < OptimizerChoice().update_bytes([(3, 4)], "cuda")


def test_lion_moves_by_the_sign_of_the_average():
    """Against the formula of arXiv:2302.06675, algorithm 2."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = OptimizerChoice("lion", {"betas": (0.9, 0.99), "weight_decay": 0.1}).build(0.01, [weight])
    expected, average = weight.detach().clone(), torch.zeros(3)
    for step in range(4):
        gradient = torch.randn(3, generator=torch.Generator().manual_seed(step))
        expected -= 0.01 * ((0.9 * average + 0.1 * gradient).sign() + 0.1 * expected)
        average = 0.99 * average + 0.01 * gradient
        weight.grad = gradient
        optimizer.step()
    assert torch.allclose(weight, expected, atol=1e-7)


@pytest.mark.slow
def test_no_package_is_imported_for_the_default(run_python):
    """bitsandbytes takes as long to import as torch."""
    code = (
        "import sys, torch; from torch import nn\n"
        "from diffsynth_core.adapters.lora import add_lora\n"
        "from diffsynth_core.planning.training.optimizer_choice import OptimizerChoice\n"
        "model = nn.Sequential(nn.Linear(2, 2)); add_lora(model, ['0'], 1, 0)\n"
        "OptimizerChoice().build(0.1, model.parameters())\n"
        "print([name for name in ('bitsandbytes', 'pytorch_optimizer') if sys.modules.get(name)])"
    )
    assert run_python(code) == "[]\n"


@pytest.fixture
def run_python():
    import subprocess

    return lambda code: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_adafactor_as_fit_chooses_it_steps_as_far_as_the_learning_rate_says():
    """Whatever the size of the weights, so that a learning rate for AdamW may stay."""
    other = next(other for other in OTHER_OPTIMIZERS if other.parameters.get("optimizer") == "adafactor")
    parameters = Parameters.model_validate({**other.parameters, "learning_rate": 1e-5})
    with collect_problems() as problems:
        choice = choose_optimizer(parameters, DEFAULT, frozenset())
    assert problems == [] and list(rate_warnings(parameters, choice)) == []
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 0.02, 0.5):
        weight = nn.Parameter(scale * torch.randn(64, 48, generator=generator))
        optimizer, start = choice.build(1e-5, [weight]), weight.detach().clone()
        weight.grad = torch.randn(64, 48, generator=generator)
        optimizer.step()
        step = (weight.detach() - start).square().mean().sqrt().item()
        assert 0.5e-5 < step <= 1.01e-5, scale
    usual = OptimizerChoice("adafactor", {"weight_decay": 0.0})
    assert len(list(rate_warnings(parameters, usual))) == 1

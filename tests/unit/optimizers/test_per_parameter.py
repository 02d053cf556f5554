"""One parameter after the other, against one optimizer of all: every row of the table that claims it."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffsynth_core.checkpoints.saved_states import OPTIMIZER
from diffsynth_core.optimizers.averaging import AveragedOptimizer
from diffsynth_core.optimizers.per_parameter import PerParameterOptimizer
from diffsynth_core.optimizers.stochastic_rounding import RoundedOptimizer
from diffsynth_core.planning.training.optimizer_choice import OptimizerChoice
from diffsynth_core.planning.training.optimizers import OPTIMIZERS
from tests.unit.optimizers.test_optimizers import RATES, SHAPES, restore, save, trained

CPU = torch.device("cpu")
CHOICES = {
    **{name: OptimizerChoice(name, {"weight_decay": 0.01}) for name, spec in OPTIMIZERS.items() if spec.by_tensor},
    "adamw fused": OptimizerChoice("adamw", {"fused": True}),
    "adamw8bit without small tensors": OptimizerChoice("adamw8bit", {"min_8bit_size": 0}),
    "adamw with averages": OptimizerChoice("adamw", ema_decay=0.3),
}


def make_whole(choice: OptimizerChoice, weights: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    build = partial(choice.build, RATES.get(choice.name, 0.01))
    rounded = any(weight.dtype == torch.bfloat16 for weight in weights.values())
    optimizer = RoundedOptimizer(build, weights, 0) if rounded else build(weights.values())
    return AveragedOptimizer(optimizer, choice.ema_decay) if choice.ema_decay else optimizer


def weights_in(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Those of the other tests; in bfloat16, but for one."""
    return {
        name: nn.Parameter(value.to(torch.float32 if name == "bias" else dtype)) for name, value in trained().items()
    }


def take_step(weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int, fused: bool) -> None:
    """Update all weights; `fused`: each when its gradient is there, the last first."""
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * 0.9**step
        if "update" in group:
            group["update"] = step
    generator = torch.Generator().manual_seed(step)
    gradients = {name: torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
    if fused:
        optimizer.begin()
    for name in reversed(gradients):
        weights[name].grad = gradients[name].to(weights[name].dtype)
        if fused:
            optimizer.update(weights[name])
            weights[name].grad = None
    optimizer.finish() if fused else optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_weights_and_saved_states_are_those_of_one_optimizer(tmp_path: Path, choice, dtype):
    """Each way begins from what another saved: they may be exchanged between steps."""
    make = partial(make_whole, choice)
    plain_weights = weights_in(dtype)
    plain = make(plain_weights)
    for step in range(6):
        take_step(plain_weights, plain, step, fused=False)
    save(tmp_path / "plain", plain_weights, plain, 6)

    folder = None
    for number, (on_host, fused) in enumerate(((False, True), (True, True), (True, False))):
        weights = weights_in(dtype)
        optimizer = PerParameterOptimizer(make, weights, CPU, SHAPES if on_host else ())
        if folder:
            restore(folder, weights, optimizer)
        folder = tmp_path / str(number)
        for step in (2 * number, 2 * number + 1):
            take_step(weights, optimizer, step, fused)
        save(folder, weights, optimizer, 2 * number + 2)
    assert all(torch.equal(weights[name], plain_weights[name]) for name in SHAPES)
    one, other = (path / "state/step-6" / OPTIMIZER for path in (tmp_path / "plain", folder))
    assert one.read_bytes() == other.read_bytes()


def test_a_state_on_the_host_is_updated_in_a_copy_and_put_back():
    weights = trained()
    optimizer = PerParameterOptimizer(partial(make_whole, OptimizerChoice()), weights, CPU, on_host=SHAPES)
    take_step(weights, optimizer, 0, fused=True)

    def memory() -> dict[str, int]:
        return {name: optimizer.state[weight]["exp_avg"].data_ptr() for name, weight in weights.items()}

    before, updated = memory(), []
    part = optimizer._parts[weights["matrix"]]
    part.register_step_post_hook(lambda part, *_: updated.append(part.state[weights["matrix"]]["exp_avg"]))
    take_step(weights, optimizer, 1, fused=True)
    assert memory() == before and updated[0].data_ptr() not in before.values()
    assert torch.equal(updated[0], optimizer.state[weights["matrix"]]["exp_avg"])
    updated[0].fill_(torch.nan)  # as memory of the device that is used again
    take_step(weights, optimizer, 2, fused=True)
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("choice", [OptimizerChoice("lion"), OptimizerChoice("came")], ids=["lion", "came"])
def test_a_step_that_is_counted_in_the_group_is_counted_once(choice):
    weights = trained()
    optimizer = PerParameterOptimizer(partial(make_whole, choice), weights, CPU)
    for step in range(3):
        take_step(weights, optimizer, step, fused=True)
    assert [group["step"] for group in optimizer.param_groups] == [3]


def test_a_gradient_is_complete_for_an_optimizer_before_processes_average_it():
    """Why a fused backward pass is refused on several processes: DDP reduces gradients later than hooks of parameters
    see them. Here the reduction multiplies by 10.
    """
    from torch.nn.parallel import DistributedDataParallel

    def reduce(state: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer() * 10)
        return future

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        layer = nn.Linear(2, 1, bias=False)
        seen: list[Tensor] = []
        layer.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
        model = DistributedDataParallel(layer)
        model.register_comm_hook(None, reduce)
        model(torch.ones(1, 2)).sum().backward()
        assert layer.weight.grad.tolist() == [[10, 10]]
        assert [gradient.tolist() for gradient in seen] == [[[1, 1]]]
    finally:
        torch.distributed.destroy_process_group()

"""bfloat16 weights that do not lose small updates, and the rounding behind it."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from diffsynth_core.optimizers.names import UPDATE
from diffsynth_core.optimizers.stochastic_rounding import CHUNK, RoundedOptimizer, round_stochastically
from diffsynth_core.planning.training.optimizer_choice import OptimizerChoice
from diffsynth_core.planning.training.optimizers import OPTIMIZERS
from diffsynth_core.randomness import _mix
from tests.unit.optimizers.test_optimizers import GOAL, SHAPES, restore, save, trained

ADAMW = OptimizerChoice("adamw", {"weight_decay": 0.0})


def rounded(values: Tensor, key: int, start: int = 0) -> Tensor:
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    round_stochastically(values, key, out, start)
    return out


def wide_and_narrow(seed: int = 0) -> dict[str, nn.Parameter]:
    """Weights in bfloat16, but one that stays float32 and so is updated as usual."""
    weights = trained(seed)
    return {
        name: weight if name == "bias" else nn.Parameter(weight.detach().bfloat16()) for name, weight in weights.items()
    }


def steps(weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, first: int, count: int) -> None:
    goal = trained(GOAL)
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(100 + step)
        for name, weight in weights.items():
            noise = torch.randn(weight.shape, generator=generator)
            weight.grad = (weight.detach().float() - goal[name].detach() + 0.1 * noise).to(weight.dtype)
        for group in optimizer.param_groups:
            if UPDATE in group:
                group[UPDATE] = step
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_the_mean_of_many_roundings_is_the_number():
    """Within four standard deviations of the mean, for shares of either size and either sign."""
    values = torch.tensor([1.0 + 2**-8 * share for share in (0.0, 0.02, 0.25, 0.5, 0.9)] + [-3.3e-5, 2.7e20])
    draws = 4096
    found = rounded(values.repeat(draws), key=5).double().reshape(draws, -1)
    spacing = values.abs().log2().floor().exp2() * 2**-7
    assert ((found.mean(0) - values).abs() <= 4 * 0.5 * spacing / draws**0.5).all()
    assert ((found - values).abs() < spacing).all(), "one of the two neighbors"
    assert (found[:, 0] == 1).all(), "what bfloat16 has is not changed"


def test_rounding_up_has_the_probability_of_the_share():
    share = 0.3
    value = torch.full((40_000,), 2.0 + share * 2**-6)
    up = (rounded(value, key=1) > 2).double().mean()
    assert abs(up - share) < 4 * (share * (1 - share) / 40_000) ** 0.5


def test_what_is_not_finite_stays():
    found = rounded(torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0]), key=3)
    assert found[0].isnan() and found[1:].tolist() == [torch.inf, -torch.inf, 0, 0]


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (3, 50), (4, 8), (49, 50), (CHUNK - 1, CHUNK + 3)])
def test_a_part_is_rounded_as_in_the_whole(start, stop):
    """A shard draws its slice of the numbers of the whole parameter."""
    whole = torch.full((stop + 2,), 1.001)
    assert torch.equal(rounded(whole, key=9)[start:stop], rounded(whole[start:stop], key=9, start=start))


def test_rows_are_updated_as_in_the_whole():
    """By a process that holds the last rows of each parameter, and knows where they start."""
    whole = wide_and_narrow()
    first = {name: len(weight) // 2 for name, weight in whole.items()}
    part = {name: nn.Parameter(weight.detach()[first[name] :].clone()) for name, weight in whole.items()}
    starts = {name: first[name] * weight[0].numel() for name, weight in whole.items()}
    build = partial(ADAMW.build, 0.01)
    optimizers = RoundedOptimizer(build, whole, 7), RoundedOptimizer(build, part, 7, starts)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for name, weight in whole.items():
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
            part[name].grad = weight.grad[first[name] :].clone()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group[UPDATE] = step
            optimizer.step()
    assert all(torch.equal(weight[first[name] :], part[name]) for name, weight in whole.items())


def test_the_random_numbers_are_those_of_splitmix64():
    """From `randomness`, in Python's integers: for indices and keys that wrap around 64 bits."""
    from diffsynth_core.optimizers.stochastic_rounding import _random_16_bits

    for key in (0, 12345, (1 << 64) - 1, 0x9E3779B97F4A7C15):
        for start in (0, 7, 10**9):
            found = _random_16_bits(key, start, 9, torch.device("cpu")).tolist()
            mask = (1 << 64) - 1
            words = {at: _mix((key + (at // 4 - 1) * 0x9E3779B97F4A7C15) & mask) for at in range(start, start + 9)}
            assert found == [word >> 16 * (at % 4) & 0xFFFF for at, word in words.items()]


def test_keys_and_places_draw_other_numbers():
    value = torch.full((4096,), 1.0 + 2**-8)
    one, other = rounded(value, key=1), rounded(value, key=2)
    assert 0.45 < (one == other).double().mean() < 0.55
    assert 0.45 < (one[1:] == one[:-1]).double().mean() < 0.55


def test_small_updates_arrive_where_plain_bfloat16_loses_them():
    """200 steps at 1e-5 with noisy gradients: the displacement, projected on that of float32 training. The distance
    would be no measure, for it grows with the noise of rounding.
    """
    generator = torch.Generator().manual_seed(0)
    start = (0.5 * torch.randn(300, 200, generator=generator)).bfloat16()
    slope = torch.randn(300, 200, generator=generator)

    def train(weight: nn.Parameter, optimizer: torch.optim.Optimizer) -> Tensor:
        for step in range(200):
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            weight.grad = (slope + 2 * noise).to(weight.dtype)
            for group in optimizer.param_groups:
                group[UPDATE] = step
            optimizer.step()
        return weight.detach().double() - start.double()

    def build(weights):
        return ADAMW.build(1e-5, weights)

    float32, plain, ours = (nn.Parameter(start.clone().to(dtype)) for dtype in (torch.float32, *[torch.bfloat16] * 2))
    expected = train(float32, build([float32]))

    def projection(displacement: Tensor) -> float:
        return float((displacement * expected).sum() / expected.square().sum())

    assert 0.95 < projection(train(ours, RoundedOptimizer(build, {"dit.weight": ours}, seed=0))) < 1.05
    assert projection(train(plain, build([plain]))) < 0.2


BY_TENSOR = [name for name, spec in OPTIMIZERS.items() if spec.by_tensor]


@pytest.mark.parametrize("name", BY_TENSOR)
def test_a_resumed_run_ends_as_one_that_never_stopped(tmp_path, name):
    choice = OptimizerChoice(name, {"weight_decay": 0.01})

    def build(weights):
        return choice.build(0.01, weights)

    through = wide_and_narrow()
    optimizer = RoundedOptimizer(build, through, seed=3)
    steps(through, optimizer, 0, 3)
    save(tmp_path, through, optimizer, 3)
    steps(through, optimizer, 3, 3)
    resumed = wide_and_narrow(seed=1)
    other = RoundedOptimizer(build, resumed, seed=3)
    restore(tmp_path, resumed, other)
    steps(resumed, other, 3, 3)
    assert all(torch.equal(through[name], resumed[name]) for name in SHAPES)
    assert not torch.equal(through["matrix"], wide_and_narrow()["matrix"])
    memory = sum(
        value.nbytes
        for weight in through.values()
        for value in optimizer.state[weight].values()
        if isinstance(value, Tensor) and value.dim()
    )
    assert memory == choice.state_bytes(SHAPES.values())


def test_each_part_is_what_the_optimizer_makes_of_float32():
    """The float32 weight as without rounding; the others within one step of bfloat16, in the first update."""
    ours, plain = wide_and_narrow(), {name: nn.Parameter(w.detach().float()) for name, w in wide_and_narrow().items()}

    def build(weights):
        return ADAMW.build(0.01, weights)

    optimizer = RoundedOptimizer(build, ours, seed=0)
    steps(ours, optimizer, 0, 1)
    goal, other = trained(GOAL), build(plain.values())
    generator = torch.Generator().manual_seed(100)
    for name, weight in plain.items():
        noise = torch.randn(weight.shape, generator=generator)
        weight.grad = (weight.detach() - goal[name].detach() + 0.1 * noise).to(ours[name].dtype).float()
    other.step()
    assert torch.equal(ours["bias"], plain["bias"])
    for name in SHAPES:
        spacing = plain[name].detach().abs().log2().floor().exp2() * 2**-7
        assert ((ours[name].float() - plain[name]).abs() <= spacing).all(), name
    assert all(copy.untyped_storage().nbytes() == 4 for copy in optimizer._copies), "no float32 copy remains"


def test_seed_step_and_name_each_change_the_rounding():
    def first_update(seed: int = 0, step: int = 0, name: str = "dit.w") -> Tensor:
        weight = nn.Parameter(torch.ones(64, 64).bfloat16())
        optimizer = RoundedOptimizer(lambda weights: ADAMW.build(1e-3, weights), {name: weight}, seed)
        optimizer.param_groups[0][UPDATE] = step
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        return weight.detach()

    base = first_update()
    assert torch.equal(base, first_update())
    assert not any(
        torch.equal(base, other) for other in (first_update(seed=1), first_update(step=1), first_update(name="dit.v"))
    )

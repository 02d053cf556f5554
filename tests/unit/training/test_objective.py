"""Flow matching by hand: weights, noise and loss, each a pure function of its keys."""

import math

import pytest
import torch
from torch.testing import assert_close

from diffsynth_core.models.qwen_image.forward import sigmas
from diffsynth_core.training.objective import add_noise, draw_noise, timestep_weights, velocity_loss

SHAPE = torch.Size([16, 1, 8, 8])


def test_the_weights_of_qwen_image():
    weights = timestep_weights(sigmas())
    assert weights.dtype == torch.float32 and weights.shape == (1000,)
    assert weights[0] == 0
    assert (weights[1:] > 0).all()
    assert abs(weights.double().mean() - 1) < 1e-6
    assert round(weights.max().item(), 3) == 1.683


def test_the_weight_is_the_bell_of_the_sigma():
    table = sigmas().double()
    bell = [math.exp(-2 * ((1000 * sigma - 500) / 1000) ** 2) for sigma in table.tolist()]
    raised = [value - min(bell) for value in bell]
    expected = torch.tensor([value * 1000 / sum(raised) for value in raised])
    assert_close(timestep_weights(sigmas()), expected, rtol=1e-5, atol=1e-6)
    assert abs(table[int(timestep_weights(sigmas()).argmax())] - 0.5) < 0.001


@pytest.mark.parametrize("changed", range(4))
def test_noise_depends_on_every_part_of_its_key(changed):
    key, other = [5] * 4, [6 if place == changed else 5 for place in range(4)]
    assert torch.equal(draw_noise(*key, shape=SHAPE), draw_noise(*key, shape=SHAPE))
    assert not torch.isclose(draw_noise(*key, shape=SHAPE), draw_noise(*other, shape=SHAPE)).any()


def test_noise_has_nothing_to_do_with_the_timestep_or_the_order_of_its_key():
    assert not torch.equal(draw_noise(0, 0, 1, 0, SHAPE), draw_noise(0, 0, 0, 1, SHAPE))
    assert not torch.equal(draw_noise(0, 1, 0, 0, SHAPE), draw_noise(1, 0, 0, 0, SHAPE))


def test_noise_is_standard_normal_float32_on_the_cpu():
    noise = draw_noise(0, 0, 0, 0, torch.Size([4, 100, 100]))
    assert noise.dtype == torch.float32 and noise.device.type == "cpu" and noise.shape == (4, 100, 100)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs((noise.abs() < 1).float().mean() - 0.6827) < 0.01


def test_noise_leaves_the_global_generator_alone_and_is_left_alone_by_it():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = draw_noise(0, 0, 0, 0, SHAPE)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(draw_noise(0, 0, 0, 0, SHAPE), first)


def test_the_seed_may_be_as_large_as_the_parameter_allows():
    assert draw_noise(2**63 - 1, 0, 0, 0, SHAPE).isfinite().all()


def test_noise_is_mixed_in_by_each_sample_s_own_sigma():
    latents = torch.tensor([2.0, 4.0]).view(2, 1, 1, 1, 1).expand(2, 3, 1, 2, 2)
    noise = torch.full_like(latents, 10.0)
    mixed = add_noise(latents, noise, torch.tensor([0.25, 1.0]))
    assert mixed.shape == latents.shape
    assert mixed[0].unique().tolist() == [0.75 * 2 + 0.25 * 10]
    assert mixed[1].unique().tolist() == [10.0]


@pytest.mark.parametrize("sigma", [0.02, 0.3, 1.0])
def test_the_target_is_the_slope_of_the_path(sigma):
    latents, noise = torch.randn(1, 2, 1, 2, 2).double(), torch.randn(1, 2, 1, 2, 2).double()
    later, earlier = (
        add_noise(latents, noise, torch.tensor([sigma + step], dtype=torch.float64)) for step in (1e-4, -1e-4)
    )
    loss = velocity_loss((later - earlier) / 2e-4, latents, noise, torch.ones(1))
    assert loss.item() < 1e-9


def test_the_loss_by_hand():
    latents = torch.tensor([[1.0, 2.0], [0.0, 0.0]]).view(2, 2, 1, 1, 1)
    noise = torch.tensor([[3.0, 2.0], [1.0, 5.0]]).view(2, 2, 1, 1, 1)
    prediction = torch.tensor([[2.0, 4.0], [0.0, 5.0]]).view(2, 2, 1, 1, 1)
    # targets 2, 0 and 1, 5: differences 0, 4 and -1, 0
    loss = velocity_loss(prediction, latents, noise, torch.tensor([0.5, 3.0]))
    assert loss.tolist() == [(0 + 16) / 2 * 0.5, (1 + 0) / 2 * 3]


def test_the_loss_of_a_bfloat16_prediction_is_taken_in_float32():
    prediction = torch.tensor([1.0, 256.0], dtype=torch.bfloat16).view(1, 2).requires_grad_()
    latents, noise = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.001, 256.5]])
    loss = velocity_loss(prediction, latents, noise, torch.ones(1))
    assert loss.dtype == torch.float32
    assert_close(loss, torch.tensor([(0.001**2 + 0.5**2) / 2]), rtol=1e-3, atol=0)
    loss.sum().backward()
    assert prediction.grad is not None and prediction.grad[0, 1] != 0


def test_a_weight_of_zero_silences_a_sample():
    prediction = torch.ones(2, 4, requires_grad=True)
    velocity_loss(prediction, torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0.0, 1.0])).sum().backward()
    assert prediction.grad[0].count_nonzero() == 0 and prediction.grad[1].count_nonzero() == 4

"""The sampling loop on a model whose answer is known: exact velocities lead back to the latents."""

import pytest
import torch
from torch import Tensor

from diffsynth_core.generation.sampling import Sampler, draw_noise
from diffsynth_core.models.registry import load_family
from tests.toy_family import Toy, variant

TOY = variant({}, (), "")
SHAPE = (1, 4, 2, 3, 5)


class Exact:
    """Predicts the velocity of a straight line from the noise to the latents `wanted`; counts its calls."""

    def __init__(self, wanted: Tensor) -> None:
        self.wanted, self.sigmas, self.seen = wanted, [], []

    def __call__(self, noisy: Tensor, sigma: Tensor, batches: list[dict[str, Tensor]]) -> list[Tensor]:
        self.sigmas += [float(sigma)] * len(batches)
        self.seen.append(noisy)
        return [(noisy - batch.get("wanted", self.wanted)) / sigma for batch in batches]


def started(steps: int = 4, seed: int = 1) -> Sampler:
    return Sampler(Toy(), TOY, seed, steps, SHAPE, torch.device("cpu"))


@pytest.fixture
def exact() -> Exact:
    return Exact(torch.linspace(-1, 1, 120).reshape(SHAPE))


def test_exact_velocities_end_at_the_latents(exact):
    sampler = started()
    for _ in sampler.denoise(exact, {}, None, 1.0):
        pass
    assert torch.allclose(sampler.latents, exact.wanted, atol=5e-3)  # timesteps of the scheduler are integers
    assert len(exact.sigmas) == 4 and exact.sigmas == sorted(exact.sigmas, reverse=True)
    assert torch.equal(exact.seen[0], draw_noise(1, SHAPE))


def test_guidance_predicts_with_both_prompts_at_each_step(exact):
    negative = {"wanted": torch.zeros(SHAPE)}
    sampler = started()
    for _ in sampler.denoise(exact, {}, negative, 3.0):
        pass
    assert len(exact.sigmas) == 8
    assert torch.allclose(sampler.latents, 3 * exact.wanted, atol=2e-2)


def test_two_denoisers_share_the_steps_at_the_boundary(exact):
    sampler, whole = started(steps=8), started(steps=8)
    above = sampler.steps_above(0.5)
    first = sum(1 for _ in sampler.denoise(exact, {}, None, 1.0, boundary=0.5))
    assert first == above and 0 < first < 8
    assert min(exact.sigmas) >= 0.5
    second = sum(1 for _ in sampler.denoise(exact, {}, None, 1.0))
    assert first + second == 8 and exact.sigmas[first] < 0.5
    for _ in whole.denoise(exact, {}, None, 1.0):
        pass
    assert torch.equal(sampler.latents, whole.latents)


def test_clean_latents_are_held_before_each_prediction_and_at_the_end(exact):
    given = torch.zeros(1, 1, 2, 1, 1)
    given[:, :, 0] = 1
    clean = torch.full(SHAPE, 5.0)
    sampler = started()
    for _ in sampler.denoise(exact, {"given": given, "latents": clean}, None, 1.0):
        pass
    assert all((seen[:, :, 0] == 5).all() for seen in exact.seen)
    assert (sampler.latents[:, :, 0] == 5).all()
    assert torch.allclose(
        sampler.latents[:, :, 1], exact.wanted[:, :, 1], atol=5e-3
    )  # timesteps of the scheduler are integers


def test_the_noise_is_that_of_the_seed():
    assert not torch.equal(draw_noise(1, SHAPE), draw_noise(2, SHAPE))
    without_frames = torch.randn((1, 8, 3, 5), generator=torch.Generator("cpu").manual_seed(1))
    assert torch.equal(draw_noise(1, SHAPE).reshape(1, 8, 3, 5), without_frames)


def test_guidance_of_qwen_image_keeps_the_norm_of_each_token():
    family = load_family("qwen-image")
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn((1, 16, 1, 4, 6), generator=generator) for _ in range(2))
    guided = family.guide(positive, negative, 4.0)

    def norms(velocity: Tensor) -> Tensor:
        """Of patches of 2 x 2."""
        return velocity.unfold(3, 2, 2).unfold(4, 2, 2).square().sum(dim=(1, 2, 5, 6)).sqrt()

    assert torch.allclose(norms(guided), norms(positive), rtol=1e-5)
    assert not torch.allclose(guided, positive, rtol=0.1)
    assert torch.allclose(family.guide(positive, negative, 1.0), positive, rtol=1e-5)

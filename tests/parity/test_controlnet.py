"""ControlNets against diffusers' `QwenImageControlNetPipeline` and `FluxControlNetPipeline`.

float32, tiny weights, one step each, from a control image to the prediction.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_controlnet
from diffusers.pipelines.qwenimage import pipeline_qwenimage_controlnet
from PIL import Image
from torch import Tensor

from diffsynth_core.data.images import load_image
from diffsynth_core.models.patches import pack
from diffsynth_core.training.objective import add_noise
from tests.gradients import unused_parameters
from tests.parity.controlnet_models import KINDS, Kind, load_pipeline, write_models
from tests.parity.models import Ours, load_ours
from tests.parity.numbers import TOLERANCE, OneStep, difference, noise_for, recorded
from tests.parity.photographs import photograph, pixels_of

HEIGHT, WIDTH = 64, 96
PROMPT = "an astronaut before a flag"
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
"""Warning of diffusers' own `FluxControlNetModel`."""


@dataclass(frozen=True)
class Pair:
    """One model, loaded by both."""

    kind: Kind
    ours: Ours
    pipeline: Any


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Return each variant, loaded once."""

    def load(name: str) -> Pair:
        base = tmp_path_factory.mktemp("controlled")
        write_models(base, KINDS[name])
        entries = (f"{KINDS[name].model_id}:{place}" for place in KINDS[name].places.values())
        ours = load_ours(base, entries, extra_inputs=("controlnet_image",))
        return Pair(KINDS[name], ours, load_pipeline(base, KINDS[name]))

    return cache(load)


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, pairs: Callable[[str], Pair]) -> Pair:
    return pairs(request.param)


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Image.Image:
    """Return the control image, loaded by us at the size of the target: the file is larger and of another shape."""
    path = tmp_path_factory.mktemp("images") / "coffee.png"
    photograph("coffee").save(path)
    return Image.fromarray(load_image(path, HEIGHT, WIDTH))


@torch.no_grad()
def encoded(pair: Pair, followed: Image.Image) -> dict[str, Tensor]:
    """Return a sample, encoded as in a run."""
    made, control = (
        pixels_of(image).contiguous() for image in (photograph("astronaut").resize((WIDTH, HEIGHT)), followed)
    )
    return pair.ours.encode({"prompt": PROMPT, "image": made, "controlnet_image": [control]})


@pytest.fixture(autouse=True)
def _posterior_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the mean of the control image's posterior, as elsewhere; the pipelines sample from it."""
    for module in (pipeline_qwenimage_controlnet, pipeline_flux_controlnet):
        monkeypatch.setattr(module, "retrieve_latents", lambda posterior, generator=None: posterior.latent_dist.mode())


@torch.no_grad()
@pytest.mark.parametrize("index", [3, 900])
def test_one_step_is_that_of_the_pipeline(pair, followed, index):
    ours, pipeline = pair.ours, pair.pipeline
    sigma = ours.family.sigmas()[[index]]
    batch = ours.family.collate([encoded(pair, followed)])
    noisy = add_noise(batch["latents"], noise_for(batch["latents"], seed=index), sigma)
    pipeline.scheduler = OneStep.at(sigma)
    pixels = pixels_of(followed).contiguous()[None, :, 0]
    assert difference(pixels, pipeline.image_processor.preprocess(followed, height=HEIGHT, width=WIDTH)) < 1e-6
    with recorded(pipeline.controlnet, pipeline.transformer, ours.components["controlnet"], ours.transformer) as calls:
        pipeline(
            prompt=PROMPT, control_image=pixels, height=HEIGHT, width=WIDTH, num_inference_steps=1,
            latents=pack(noisy), output_type="latent",
            **({"guidance_scale": 1.0} if pair.kind.family == "flux" else {}),
        )  # fmt: skip
        prediction = ours.predict(noisy, sigma, batch)

    (their_control, their_added), (theirs, (expected,)), (control, added), (mine, _) = calls
    assert their_control["conditioning_scale"] == 1.0
    compared = ("hidden_states", "controlnet_cond", "encoder_hidden_states", "pooled_projections", "guidance")
    worst = max(
        same(called.get(name), expected_call.get(name))
        for called, expected_call in ((control, their_control), (mine, theirs))
        for name in (*compared, "timestep", "txt_ids", "img_ids")
    )
    worst = max(worst, same(flat(added), flat(their_added)), difference(pack(prediction), expected))
    without = predict_without(pair, noisy, sigma, batch)
    effect = difference(prediction, without)
    print(f"worst difference {worst:.1e}, spread {expected.std():.2f}, the ControlNet moves it by {effect:.2f}")
    assert worst < TOLERANCE
    assert effect > 0.1, "the ControlNet has a say"


def predict_without(pair: Pair, noisy: Tensor, sigma: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return the prediction of the transformer alone."""
    alone = {name: module for name, module in pair.ours.components.items() if name != "controlnet"}
    return pair.ours.family.predict_velocity(alone, noisy, sigma, batch)


def flat(added: Any) -> Tensor:
    """Return all outputs of a ControlNet in one tensor."""
    parts = added if isinstance(added[0], Tensor) else [tensor for group in added for tensor in group]
    return torch.stack([part for part in parts if part.shape == parts[0].shape])


def same(mine: Tensor | None, theirs: Tensor | None) -> float:
    """Return the maximum difference of values that both have, or neither."""
    assert (mine is None) == (theirs is None)
    return 0.0 if mine is None or theirs is None else difference(mine, theirs)


@pytest.mark.parametrize("name", ["Qwen-Image", "FLUX.1"])
def test_gradients_reach_the_controlnet_through_a_frozen_transformer(pairs, followed, name):
    """They equal those of the pipeline's own two calls."""
    pair = pairs(name)
    ours, family = pair.ours.components, pair.ours.family
    batch = family.collate([encoded(pair, followed)])
    noise = noise_for(batch["latents"], seed=1)
    sigma = torch.tensor([0.6])
    noisy = add_noise(batch["latents"], noise, sigma)
    names = [name for name, _ in ours["controlnet"].named_parameters()]
    found = {}
    for whose, components in (("ours", ours), ("theirs", {**ours, "controlnet": pair.pipeline.controlnet, "dit": pair.pipeline.transformer})):  # fmt: skip
        parameters = dict(components["controlnet"].named_parameters())
        for parameter in [*parameters.values(), *components["dit"].parameters()]:
            parameter.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        loss = (family.predict_velocity(components, noisy, sigma, batch) - noise).pow(2).mean()
        found[whose] = torch.autograd.grad(loss, [parameters[name] for name in names], allow_unused=True)
        assert all(parameter.grad is None for parameter in components["dit"].parameters())
        components["controlnet"].requires_grad_(False)
    reached = {
        name for name, gradient in zip(names, found["ours"], strict=True) if gradient is not None and gradient.any()
    }
    dead = unused_parameters(family.facts, "controlnet", ours["controlnet"], pair.ours.variant)
    assert reached == set(names) - dead
    worst = max(
        difference(one, other)
        for one, other in zip(found["ours"], found["theirs"], strict=True)
        if one is not None and other is not None
    )
    assert worst < TOLERANCE

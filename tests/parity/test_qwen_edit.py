"""Editing with Qwen-Image against diffusers' `QwenImageEditPipeline` and `QwenImageEditPlusPipeline`, float32, tiny
weights, real pictures. Most tests work at a 64th of the published areas; one at all of them."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from torch import Tensor

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.families.patches import pack
from diffsynth_core.families.qwen_image.inputs import edit_latents
from diffsynth_core.families.qwen_image.variants import prompt_size, vae_size
from diffsynth_core.training.objective import add_noise, velocity_loss
from tests.parity.qwen_edit_models import (
    FEW_PIXELS,
    KINDS,
    PUBLISHED_PIXELS,
    SIZE,
    EditPair,
    load_ours,
    picture,
    shrink_published_areas,
)

TOLERANCE = 1e-5
CAPTIONS = {
    "empty": "",
    "plain": "make it red",
    "braces": "write {} and {name} on the cup",
    "Chinese": "把杯子换成蓝色, émoji 🙂 and\nnewlines",
    "long": "word " * 500,
}
TWO = "2509, two pictures"


def difference(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    return float((left.double() - right.double()).detach().abs().max())


@pytest.fixture
def _small(monkeypatch) -> None:
    shrink_published_areas(monkeypatch)


class OneStep(FlowMatchEulerDiscreteScheduler):
    """The pipelines' scheduler, asked for a single step from a given sigma."""

    sigma: Tensor

    def set_timesteps(self, *_: Any, sigmas: Any = None, **__: Any) -> None:
        self.timesteps = self.sigma * 1000
        self.sigmas = torch.cat([self.sigma, torch.zeros(1)])
        self._step_index = self._begin_index = None


def run_pipeline(edit: EditPair, caption: str, noisy: Tensor, sigma: Tensor) -> tuple[dict[str, Any], Tensor]:
    """One step of the pipeline from given latents: what its transformer was given, and what it said."""
    calls: list[tuple[dict[str, Any], Tensor]] = []
    hook = edit.pipeline.transformer.register_forward_hook(
        lambda _, positional, named, output: calls.append((named, output[0])), with_kwargs=True
    )
    edit.pipeline.scheduler = OneStep()
    edit.pipeline.scheduler.sigma = sigma
    height, width = SIZE
    edit.pipeline(
        image=edit.pictures[0] if len(edit.pictures) == 1 else edit.pictures,
        prompt=caption,
        height=height,
        width=width,
        num_inference_steps=1,
        true_cfg_scale=1.0,
        latents=pack(noisy),
        output_type="latent",
    )
    hook.remove()
    (call,) = calls
    return call


@torch.no_grad()
def check_against_pipeline(edit: EditPair, caption: str, max_pixels: int) -> None:
    """Text, references, positions and the prediction of one sample are those of the pipeline."""
    ours = edit.ours
    sigma = torch.tensor([0.75])
    batch = ours.family.collate([ours.encode(ours.sample(caption, edit.pictures, max_pixels))])
    noise = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(1))
    noisy = add_noise(batch["latents"], noise, sigma)
    theirs, expected = run_pipeline(edit, caption, noisy, sigma)

    calls: list[dict[str, Any]] = []
    hook = ours.components["dit"].register_forward_pre_hook(
        lambda _, positional, named: calls.append(named), with_kwargs=True
    )
    prediction = ours.family.predict_velocity(ours.components, noisy, sigma, batch)
    hook.remove()
    (mine,) = calls
    made = pack(noisy).shape[1]
    assert [list(shapes) for shapes in mine["img_shapes"]] == [list(shapes) for shapes in theirs["img_shapes"]]
    assert len(mine["img_shapes"][0]) == 1 + len(edit.pictures)
    assert torch.equal(mine["timestep"], theirs["timestep"])
    assert mine["encoder_hidden_states_mask"] is None and theirs["encoder_hidden_states_mask"] is None
    worst = {
        "text": difference(mine["encoder_hidden_states"], theirs["encoder_hidden_states"]),
        "references": difference(mine["hidden_states"][:, made:], theirs["hidden_states"][:, made:]),
        "prediction": difference(pack(prediction), expected[:, :made]),
    }
    said = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    tokens = tuple(mine["hidden_states"].shape[1:2]) + tuple(mine["encoder_hidden_states"].shape[1:2])
    print(f"{edit.kind.model_id}, {len(edit.pictures)} pictures, {tokens} tokens: {said}")
    assert max(worst.values()) < TOLERANCE
    assert expected[:, :made].std() > 0.1 and theirs["encoder_hidden_states"].std() > 0.1, (
        "there is something to compare"
    )


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("caption", CAPTIONS.values(), ids=CAPTIONS)
def test_one_step_is_that_of_the_pipeline(edit, caption):
    check_against_pipeline(edit, caption, FEW_PIXELS)


@pytest.mark.parametrize("edit", ["Edit", "2509, one picture"], indirect=True)
def test_one_step_is_that_of_the_pipeline_at_the_published_sizes(edit):
    check_against_pipeline(edit, CAPTIONS["plain"], PUBLISHED_PIXELS)


# Text


@torch.no_grad()
def test_diffusers_itself_leaves_out_which_tokens_are_pictures(edit_pairs, monkeypatch):
    """Why its text encoder is told in these tests: without it, transformers 5 counts the tokens of pictures like words.

    When this fails, diffusers tells (its issue 14194), and what stands in for that can go.
    """
    pipeline = edit_pairs("2509, one picture").pipeline
    image = [picture("coffee").resize((96, 64))]
    told, _ = pipeline.encode_prompt("a cup", image)
    monkeypatch.setattr(pipeline.text_encoder, "_forward_pre_hooks", {})
    untold, _ = pipeline.encode_prompt("a cup", image)
    print(f"states differ by {difference(told, untold):.1e}")
    assert difference(told, untold) > 0.1


@torch.no_grad()
def test_tokens_of_a_picture_are_placed_in_height_and_width(edit_pairs):
    """By hand: 2 x 3 tokens of a picture begin behind the text before them, which goes on behind the longer side."""
    ours = edit_pairs("2509, one picture").ours
    positions: list[Tensor] = []
    hook = ours.components["text_encoder"].model.language_model.register_forward_pre_hook(
        lambda _, positional, named: positions.append(named["position_ids"]), with_kwargs=True
    )
    image = torch.zeros(3, 1, 56, 84)
    ours.family.encode(ours.variant.encoders[0], ours.components, {"prompt": "a", "edit_image_small": [image]})
    hook.remove()
    (placed,) = positions
    # system message, `Picture`, ` `, `1`, `:`, ` `, `<|vision_start|>`
    first = 64 + 6
    behind = first + 3
    assert placed[:, 0, :first].tolist() == [list(range(first))] * 3
    assert placed[0, 0, first : first + 6].tolist() == [first] * 6
    assert placed[1, 0, first : first + 6].tolist() == [first, first, first, first + 1, first + 1, first + 1]
    assert placed[2, 0, first : first + 6].tolist() == [first, first + 1, first + 2] * 2
    rest = placed.shape[-1] - first - 6
    assert placed[:, 0, first + 6 :].tolist() == [list(range(behind, behind + rest))] * 3


@torch.no_grad()
def test_states_tell_pictures_and_their_order_apart(edit_pairs):
    ours = edit_pairs(TWO).ours
    images = [picture("astronaut"), picture("coffee").resize((512, 512))]
    one, other = (ours.encode(ours.sample("a", order))["prompt_embeds"] for order in (images, images[::-1]))
    assert difference(one, other) > 0.1


def test_captions_are_not_cut_off_but_refused_where_they_have_no_place(edit_pairs):
    """diffusers' transformer has no positions for them, and fails on shapes."""
    ours = edit_pairs(TWO).ours
    text = ours.variant.encoders[0]
    sample = ours.sample(CAPTIONS["long"], edit_pairs(TWO).pictures)
    assert ours.family.left_out(text, ours.components, sample) is None
    with pytest.raises(DiffSynthError, match="the model takes 3072: `word word"):
        ours.encode({**sample, "prompt": "word " * 900})


# Sizes and latents


@pytest.mark.parametrize("ratio", [0.01, 0.07, 0.5, 2 / 3, 0.999, 1.0, 1.2345, 16 / 9, 5.0, 30.0, 100.0])
def test_sizes_are_those_of_the_pipelines(ratio):
    width, height = round(3000 * ratio), 3000
    ratio = width / height
    (vae_width, vae_height, _), small = (
        pipeline_qwenimage_edit.calculate_dimensions(1024 * 1024, ratio),
        pipeline_qwenimage_edit_plus.calculate_dimensions(384 * 384, ratio),
    )
    assert vae_size(width, height, PUBLISHED_PIXELS) == vae_size(width, height, 4 * PUBLISHED_PIXELS)
    assert vae_size(width, height, PUBLISHED_PIXELS) == (vae_height, vae_width)
    assert prompt_size(width, height, PUBLISHED_PIXELS) == small[::-1]


@torch.no_grad()
def test_pictures_keep_their_order_and_sizes(edit_pairs):
    pair = edit_pairs("2511, two pictures")
    encoded = pair.ours.encode(pair.ours.sample("", pair.pictures))
    found = edit_latents(pair.ours.family.collate([encoded, encoded]))
    assert [tuple(latents.shape) for latents in found] == [(2, 16, 1, 12, 20), (2, 16, 1, 20, 12)]
    alone = pair.ours.encode(pair.ours.sample("", pair.pictures[1:]))
    assert torch.equal(found[1][0], alone["edit_latents_0"])
    assert "edit_latents_1" not in alone


# Timestep 0 for reference tokens


@torch.no_grad()
def test_only_2511_tells_reference_tokens_of_timestep_0(edit_pairs):
    """The tiny transformers have the same weights: what they say differs by the setting alone."""
    kinds = (TWO, "2511, two pictures")
    earlier, later = (edit_pairs(name).ours.components["dit"] for name in kinds)
    assert (earlier.zero_cond_t, later.zero_cond_t) == (False, True)
    ours, pictures = edit_pairs(TWO).ours, edit_pairs(TWO).pictures
    batch = ours.family.collate([ours.encode(ours.sample("", pictures))])
    noisy, sigma = torch.zeros_like(batch["latents"]), torch.tensor([0.5])
    first, second = (ours.family.predict_velocity({"dit": dit}, noisy, sigma, batch) for dit in (earlier, later))
    assert difference(first, second) > 0.01


@torch.no_grad()
def test_the_parameter_alone_makes_another_transformer_a_2511(edit_models, edit_pairs):
    earlier, later = load_ours(edit_models, KINDS[TWO], zero_cond_t=True), edit_pairs("2511, two pictures").ours
    batch = later.family.collate([later.encode(later.sample("", edit_pairs(TWO).pictures))])
    noisy, sigma = torch.zeros_like(batch["latents"]), torch.tensor([0.5])
    first, second = (ours.family.predict_velocity(ours.components, noisy, sigma, batch) for ours in (earlier, later))
    assert torch.equal(first, second)


# Batches


def loss_and_gradients(
    edit: EditPair, samples: list[Mapping[str, Tensor]], noise: Tensor, sigma: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a batch, and the gradients of their sum for all parameters of the transformer that can get one."""
    family, transformer = edit.ours.family, edit.ours.components["dit"]
    batch = family.collate(samples)
    noisy = add_noise(batch["latents"], noise, sigma)
    prediction = family.predict_velocity(edit.ours.components, noisy, sigma, batch)
    losses = velocity_loss(prediction, batch["latents"], noise, torch.ones(len(samples)))
    dead = family.untrainable_parameters("dit", transformer, edit.ours.variant)
    trained = {name: parameter for name, parameter in transformer.named_parameters() if name not in dead}
    gradients = torch.autograd.grad(losses.sum(), list(trained.values()))
    return losses.detach(), dict(zip(trained, gradients, strict=True))


@pytest.mark.parametrize("edit", ["Edit", TWO, "2511, two pictures"], indirect=True)
def test_a_batch_equals_its_singles(edit, request):
    edit.ours.components["dit"].requires_grad_(True)
    request.addfinalizer(lambda: edit.ours.components["dit"].requires_grad_(False))
    sizes = [image.size for image in edit.pictures]
    samples = []
    for caption, name in zip(list(CAPTIONS.values())[:4], ("astronaut", "chelsea", "coffee", "rocket"), strict=True):
        shown = [picture(name).rotate(90 * number).resize(size) for number, size in enumerate(sizes)]
        samples.append(edit.ours.encode(edit.ours.sample(caption, shown)))
    assert len({len(sample["prompt_embeds"]) for sample in samples}) == 4
    noise = torch.randn(4, *samples[0]["latents"].shape, generator=torch.Generator().manual_seed(4))
    sigma = torch.tensor([1.0, 0.9, 0.6, 0.1])
    together, gradients = loss_and_gradients(edit, samples, noise, sigma)
    singles = [loss_and_gradients(edit, [samples[n]], noise[[n]], sigma[[n]]) for n in range(4)]
    assert difference(together, torch.cat([losses for losses, _ in singles])) < TOLERANCE
    means = {name: torch.stack([single[name] for _, single in singles]).mean(0) for name in gradients}
    worst = max(difference(gradient / 4, means[name]) for name, gradient in gradients.items())
    scale = max(float(gradient.abs().max()) / 4 for gradient in gradients.values())
    print(f"{edit.kind.model_id}: gradients differ by {worst:.1e}, the largest is {scale:.1e}")
    assert worst < TOLERANCE < scale / 100
    assert all(gradient.any() for gradient in gradients.values())


# A text encoder that is trained


@pytest.mark.parametrize("edit", ["Edit", TWO], indirect=True)
def test_training_reaches_the_picture_half_of_the_text_encoder(edit, request):
    text_encoder = edit.ours.components["text_encoder"].requires_grad_(True)
    request.addfinalizer(lambda: text_encoder.requires_grad_(False))
    text, *_ = edit.ours.variant.encoders
    sample = edit.ours.sample("a cup", edit.pictures)
    states = edit.ours.family.encode(text, edit.ours.components, sample)["prompt_embeds"]
    names = [name for name, _ in text_encoder.named_parameters()]
    found = torch.autograd.grad(states.pow(2).sum(), list(text_encoder.parameters()), allow_unused=True)
    silent = {name for name, gradient in zip(names, found, strict=True) if gradient is None or not gradient.any()}
    assert silent == edit.ours.family.untrainable_parameters("text_encoder", text_encoder, edit.ours.variant)
    assert silent == {"lm_head.weight"}

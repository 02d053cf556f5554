"""Editing with Qwen-Image against diffusers' `QwenImageEditPipeline` and `QwenImageEditPlusPipeline`.

float32, tiny weights, real images. Most tests use a 64th of the published areas; one uses all of them.
"""

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from torch import Tensor

from diffsynth_core.errors import DiffSynthError
from diffsynth_core.models.patches import pack
from diffsynth_core.models.qwen_image.forward import edit_latents
from diffsynth_core.models.qwen_image.variants import prompt_size, vae_size
from diffsynth_core.training.objective import add_noise
from tests.gradients import unused_parameters
from tests.parity.models import FEW_PIXELS, PUBLISHED_PIXELS, SIZE
from tests.parity.numbers import TOLERANCE, OneStep, check_batch_equals_singles, difference, noise_for, recorded
from tests.parity.photographs import PHOTOGRAPHS, photograph
from tests.parity.qwen_edit_models import KINDS, EditPair, load_ours, shrink_published_areas

CAPTIONS = {
    "empty": "",
    "plain": "make it red",
    "braces": "write {} and {name} on the cup",
    "Chinese": "把杯子换成蓝色, émoji 🙂 and\nnewlines",
    "long": "word " * 500,
}
TWO = "2509, two images"


@pytest.fixture
def _small(monkeypatch) -> None:
    shrink_published_areas(monkeypatch)


def run_pipeline(edit: EditPair, caption: str, noisy: Tensor, sigma: Tensor) -> None:
    """Run one step of the pipeline from given latents."""
    edit.pipeline.scheduler = OneStep.at(sigma)
    height, width = SIZE
    edit.pipeline(
        image=edit.images[0] if len(edit.images) == 1 else edit.images,
        prompt=caption,
        height=height,
        width=width,
        num_inference_steps=1,
        true_cfg_scale=1.0,
        latents=pack(noisy),
        output_type="latent",
    )


@torch.no_grad()
def check_against_pipeline(edit: EditPair, caption: str, max_pixels: int) -> None:
    """Check that text, references, positions and the prediction of one sample equal the pipeline's."""
    ours = edit.ours
    sigma = torch.tensor([0.75])
    batch = ours.family.collate([ours.encode(ours.sample(caption, shown=edit.images, max_pixels=max_pixels))])
    noisy = add_noise(batch["latents"], noise_for(batch["latents"], seed=1), sigma)
    with recorded(edit.pipeline.transformer, ours.transformer) as calls:
        run_pipeline(edit, caption, noisy, sigma)
        prediction = ours.predict(noisy, sigma, batch)

    (theirs, (expected,)), (mine, _) = calls
    made = pack(noisy).shape[1]
    assert [list(shapes) for shapes in mine["img_shapes"]] == [list(shapes) for shapes in theirs["img_shapes"]]
    assert len(mine["img_shapes"][0]) == 1 + len(edit.images)
    assert torch.equal(mine["timestep"], theirs["timestep"])
    assert mine["encoder_hidden_states_mask"] is None and theirs["encoder_hidden_states_mask"] is None
    worst = {
        "text": difference(mine["encoder_hidden_states"], theirs["encoder_hidden_states"]),
        "references": difference(mine["hidden_states"][:, made:], theirs["hidden_states"][:, made:]),
        "prediction": difference(pack(prediction), expected[:, :made]),
    }
    said = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    tokens = tuple(mine["hidden_states"].shape[1:2]) + tuple(mine["encoder_hidden_states"].shape[1:2])
    print(f"{edit.kind.model_id}, {len(edit.images)} images, {tokens} tokens: {said}")
    assert max(worst.values()) < TOLERANCE
    assert expected[:, :made].std() > 0.1 and theirs["encoder_hidden_states"].std() > 0.1, (
        "there is something to compare"
    )


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("caption", CAPTIONS.values(), ids=CAPTIONS)
def test_one_step_is_that_of_the_pipeline(edit, caption):
    check_against_pipeline(edit, caption, FEW_PIXELS)


@pytest.mark.parametrize("edit", ["Edit", pytest.param("2509, one image", marks=pytest.mark.long)], indirect=True)
def test_one_step_is_that_of_the_pipeline_at_the_published_sizes(edit):
    check_against_pipeline(edit, CAPTIONS["plain"], PUBLISHED_PIXELS)


# Text


@torch.no_grad()
def test_diffusers_itself_leaves_out_which_tokens_are_images(edit_pairs, monkeypatch):
    """Why these tests pass `mm_token_type_ids` to its text encoder: otherwise transformers 5 numbers image tokens like
    words.

    When this fails, diffusers passes them (its issue 14194), and the workaround can be removed.
    """
    pipeline = edit_pairs("2509, one image").pipeline
    image = [photograph("coffee").resize((96, 64))]
    reported, _ = pipeline.encode_prompt("a cup", image)
    monkeypatch.setattr(pipeline.text_encoder, "_forward_pre_hooks", {})
    unmarked, _ = pipeline.encode_prompt("a cup", image)
    print(f"states differ by {difference(reported, unmarked):.1e}")
    assert difference(reported, unmarked) > 0.1


@torch.no_grad()
def test_tokens_of_an_image_are_placed_in_height_and_width(edit_pairs):
    """By hand: 2 x 3 image tokens start after the preceding text, and the text continues after the longer side."""
    ours = edit_pairs("2509, one image").ours
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
def test_states_tell_images_and_their_order_apart(edit_pairs):
    ours = edit_pairs(TWO).ours
    images = [photograph("astronaut"), photograph("coffee").resize((512, 512))]
    one, other = (ours.encode(ours.sample("a", shown=order))["prompt_embeds"] for order in (images, images[::-1]))
    assert difference(one, other) > 0.1


def test_captions_are_not_cut_off_but_refused_where_they_have_no_place(edit_pairs):
    """diffusers' transformer has no positions for them, and fails on shapes."""
    ours = edit_pairs(TWO).ours
    text = ours.variant.encoders[0]
    sample = ours.sample(CAPTIONS["long"], shown=edit_pairs(TWO).images)
    assert ours.family.truncation_warning(text, ours.family.tokenize(text, ours.components, sample)) is None
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
def test_images_keep_their_order_and_sizes(edit_pairs):
    pair = edit_pairs("2511, two images")
    encoded = pair.ours.encode(pair.ours.sample("", shown=pair.images))
    found = edit_latents(pair.ours.family.collate([encoded, encoded]))
    assert [tuple(latents.shape) for latents in found] == [(2, 16, 1, 12, 20), (2, 16, 1, 20, 12)]
    alone = pair.ours.encode(pair.ours.sample("", shown=pair.images[1:]))
    assert torch.equal(found[1][0], alone["edit_latents_0"])
    assert "edit_latents_1" not in alone


# Timestep 0 for reference tokens


@torch.no_grad()
def test_only_2511_tells_reference_tokens_of_timestep_0(edit_pairs):
    """The tiny transformers have the same weights: their outputs differ only because of the option."""
    kinds = (TWO, "2511, two images")
    earlier, later = (edit_pairs(name).ours.components["dit"] for name in kinds)
    assert (earlier.zero_cond_t, later.zero_cond_t) == (False, True)
    ours, images = edit_pairs(TWO).ours, edit_pairs(TWO).images
    batch = ours.family.collate([ours.encode(ours.sample("", shown=images))])
    noisy, sigma = torch.zeros_like(batch["latents"]), torch.tensor([0.5])
    first, second = (ours.family.predict_velocity({"dit": dit}, noisy, sigma, batch) for dit in (earlier, later))
    assert difference(first, second) > 0.01


@torch.no_grad()
def test_the_parameter_alone_makes_another_transformer_a_2511(edit_models, edit_pairs):
    earlier, later = load_ours(edit_models, KINDS[TWO], zero_cond_t=True), edit_pairs("2511, two images").ours
    batch = later.family.collate([later.encode(later.sample("", shown=edit_pairs(TWO).images))])
    noisy, sigma = torch.zeros_like(batch["latents"]), torch.tensor([0.5])
    first, second = (ours.predict(noisy, sigma, batch) for ours in (earlier, later))
    assert torch.equal(first, second)


# Batches


@pytest.mark.parametrize("edit", ["Edit", TWO, "2511, two images"], indirect=True)
def test_a_batch_equals_its_singles(edit):
    sizes = [image.size for image in edit.images]
    samples = []
    for caption, name in zip(list(CAPTIONS.values())[:4], PHOTOGRAPHS, strict=True):
        shown = [photograph(name).rotate(90 * number).resize(size) for number, size in enumerate(sizes)]
        samples.append(edit.ours.encode(edit.ours.sample(caption, shown=shown)))
    assert len({len(sample["prompt_embeds"]) for sample in samples}) == 4
    check_batch_equals_singles(edit.ours, samples)


# A text encoder that is trained


@pytest.mark.parametrize("edit", ["Edit", TWO], indirect=True)
def test_training_reaches_the_image_half_of_the_text_encoder(edit, request):
    text_encoder = edit.ours.components["text_encoder"].requires_grad_(True)
    request.addfinalizer(lambda: text_encoder.requires_grad_(False))
    text, *_ = edit.ours.variant.encoders
    sample = edit.ours.sample("a cup", shown=edit.images)
    states = edit.ours.family.encode(text, edit.ours.components, sample)["prompt_embeds"]
    names = [name for name, _ in text_encoder.named_parameters()]
    found = torch.autograd.grad(states.pow(2).sum(), list(text_encoder.parameters()), allow_unused=True)
    silent = {name for name, gradient in zip(names, found, strict=True) if gradient is None or not gradient.any()}
    assert silent == unused_parameters(edit.ours.family.facts, "text_encoder", text_encoder, edit.ours.variant)
    assert silent == {"lm_head.weight"}
